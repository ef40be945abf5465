package main

import (
	"cmp"
	"context"
	"errors"
	"os"

	"estenroll"
)

// rehearse is do without the request, and with nothing changed: no hook is called.
func (w *work) rehearse(ctx context.Context) error {
	w.begin()
	err := cmp.Or(w.checkHooks(), w.checkPassword(os.LookupEnv))
	if err == nil {
		err = withCredentials(ctx, w.settings, w.out, w.rehearseTurn)
	}
	w.concludeOthers(err)
	return err
}

func (w *work) rehearseTurn(ctx context.Context, t turn) error {
	r := w.reports[t.credential.Name()]
	r.had = true
	if err := r.before(ctx, t.credential, w.forced); err != nil {
		r.conclude(nil, err)
		return err
	}
	plan, err := w.task(t.credential).plan(ctx)
	if err == nil {
		r.Plan = plan
		err = t.credential.DryRun(ctx, plan)
	}
	r.conclude(nil, err)
	r.after(ctx, t.credential, err)
	if r.Plan != nil && !w.asJSON {
		w.out.plan(t.credential, r.Plan, err)
	}
	return err
}

// plan prints what a run would do, and how far it was tried.
func (o *output) plan(c *estenroll.Credential, p *estenroll.Plan, err error) {
	o.result("dry run:      nothing is changed, no certificate was asked for")
	if p.Step != "" {
		o.result("would do:     go on with the %s at step %s", p.Kind, p.Step)
	} else {
		o.result("would do:     %s", p.Kind)
	}
	if p.Acts {
		o.result("when:         now")
	} else {
		o.result("when:         %s", stamp(p.At))
	}
	switch {
	case p.ServerMade:
		o.result("key:          a new one of type %s, made by the server", p.NewKey)
	case p.NewKey != "":
		o.result("key:          a new one of type %s", p.NewKey)
	}
	for _, what := range p.Wants {
		o.result("server wants: %s", what)
	}
	var pending *estenroll.PendingError
	if p.Kind != estenroll.KindReset && (err == nil || errors.As(err, &pending)) {
		o.result("server:       %s answers, and is the one that it should be", c.ServerURI())
		switch {
		case p.Wants == nil:
			o.result("server wants: not known, it was not asked")
		case len(p.Wants) == 0:
			o.result("server wants: nothing of the request")
		}
	}
}
