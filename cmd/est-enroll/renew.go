package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"estenroll"
)

func renewCommand(s *settings, out *output) *cobra.Command {
	var force, rekey, dry, detailed, asJSON bool
	command := &cobra.Command{
		Use:   "renew",
		Short: "get a new certificate when it is due, for the same key or a new one",
		Long: `Renew gets a new certificate for the key of the current one, which authenticates
the request, and keeps the current certificate as the previous one. It is for
cron or a timer, every few minutes or once a day: it renews when the later of
max-margin before the certificate's end and nominal-usage of its lifetime has
come. What fails is tried again by later runs, "attempts" times in what is left.
A run between that is silent, asks no server and exits 0. What an interrupted run
left it goes on with at once. With --force it renews now.

A certificate that has expired is enrolled again with the factory credential
(IDevID), unless no-fallback is set.

With --rekey, beside --force, it generates a new key in the HSM beside the old
one, of the configured key-type, and gets the certificate for that. The old key
stays, with its certificate, until the next completed renewal. A key that the
configuration names (key) is not replaced.

With --dry-run it changes nothing and asks for no certificate, but does all that
comes before: it opens the token and the pair that is used, has the server answer
crts and judges it, and has the token sign the request; a key is not generated. It
says what a run would do and when, also where nothing is due, and exits as a run
would that comes so far. A wrong PIN costs a try and is remembered.

With --json it prints one object: action (none, renewed, rekeyed, enrolled,
unchanged, pending or failed), reason, the old and the new certificate, the next
attempt, and with --dry-run the plan.
Where the configuration has "credentials:", it is an object by their names.`,
		Example: `  */5 * * * *  root  est-enroll renew    # /etc/cron.d/est-enroll`,
		Args:    noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if rekey && !force {
				return &usageError{errors.New("renew: --rekey is done now: it wants --force")}
			}
			changed, all := false, map[string]*renewReport{}
			err := withCredentials(cmd.Context(), s, out, func(ctx context.Context, t turn) error {
				do := renewTask(t.credential, force, rekey)
				var report *renewReport
				if asJSON {
					report = &renewReport{Name: t.credential.Name()}
					all[report.Name] = report
					if err := report.before(ctx, t.credential, force); err != nil {
						report.failed(err)
						return err
					}
				}
				if dry {
					plan, err := do.rehearse(ctx, t.credential)
					changed = changed || err == nil && plan.Acts
					if asJSON {
						report.Plan = plan
						report.after(ctx, t.credential, nil, err)
					} else if plan != nil {
						out.plan(t.credential, plan, err)
					}
					return err
				}
				result, err := do.run(ctx)
				changed = changed || err == nil && result != nil && result.Changed
				switch {
				case asJSON:
					report.after(ctx, t.credential, result, err)
				case err == nil && result != nil && result.Kind != "":
					out.outcome(result)
				}
				return t.export(ctx, t.credential, out, err)
			})
			if asJSON {
				err = errors.Join(err, printJSON(s, all, out))
			}
			if err == nil && detailed && changed {
				return &toldError{exitRenewed}
			}
			return err
		},
	}
	command.Flags().BoolVar(&force, "force", false, "renew now, whatever the age of the certificate")
	command.Flags().BoolVar(&rekey, "rekey", false, "get the certificate for a new key, which is generated; with --force")
	command.Flags().BoolVar(&dry, "dry-run", false, "do everything but ask for a certificate, change nothing, and say what a run would do")
	command.Flags().BoolVar(&detailed, "detailed-exit-code", false, "exit 10 where there is a new certificate, 0 where nothing was to do")
	command.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return command
}

// task is what a command does with a credential, and the plan of it.
type task struct {
	run  func(context.Context) (*estenroll.Result, error)
	plan func(context.Context) (*estenroll.Plan, error)
}

func renewTask(c *estenroll.Credential, force, rekey bool) task {
	switch {
	case rekey:
		return task{c.Rekey, c.PlanRekey}
	case force:
		return task{c.Renew, c.PlanRenew}
	}
	return task{c.RenewDue, c.PlanRenewDue}
}

// rehearse plans a task and does what of it changes nothing; the plan is nil where
// there can be none.
func (t task) rehearse(ctx context.Context, c *estenroll.Credential) (*estenroll.Plan, error) {
	plan, err := t.plan(ctx)
	if err != nil {
		return nil, err
	}
	return plan, c.DryRun(ctx, plan)
}

// renewReport is what renew did with a credential, for a program.
type renewReport struct {
	Name   string `json:"name"`
	Action string `json:"action"`
	// Reason is the state of the renewal before, or "forced".
	Reason string `json:"reason,omitempty"`
	Error  string `json:"error,omitempty"`
	// Old is the certificate that was current before, New one that took its place.
	Old         *validity `json:"old,omitempty"`
	New         *validity `json:"new,omitempty"`
	NextAttempt time.Time `json:"next_attempt,omitzero"`
	// Plan is what a run would do, of a dry run alone.
	Plan *estenroll.Plan `json:"plan,omitempty"`
}

type validity struct {
	Serial    string    `json:"serial"` // hexadecimal
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
}

func validityOf(status *estenroll.Status) *validity {
	if !status.Enrolled || status.Current == nil || status.Current.Serial == "" {
		return nil
	}
	return &validity{status.Current.Serial, status.Current.NotBefore, status.Current.NotAfter}
}

func (r *renewReport) before(ctx context.Context, credential *estenroll.Credential, force bool) error {
	status, err := credential.Status(ctx)
	if err != nil {
		return err
	}
	r.Old = validityOf(status)
	switch {
	case force:
		r.Reason = "forced"
	case status.Renewal != nil:
		r.Reason = string(status.Renewal.State)
	}
	return nil
}

func (r *renewReport) failed(err error) { r.Action, r.Error = "failed", oneLine(err) }

func (r *renewReport) after(ctx context.Context, credential *estenroll.Credential, result *estenroll.Result, err error) {
	var pending *estenroll.PendingError
	switch {
	case errors.As(err, &pending):
		r.Action, r.Error = "pending", oneLine(err)
	case err != nil:
		r.failed(err)
	case result == nil || result.Kind == "":
		r.Action = "none"
	case !result.Changed:
		r.Action = "unchanged"
	case result.Kind == estenroll.KindEnroll:
		r.Action = "enrolled"
	case result.Kind == estenroll.KindRekey:
		r.Action = "rekeyed"
	default:
		r.Action = "renewed"
	}
	// What it says is true whatever the run has come to, Ctrl-C too. Where the token
	// does not answer any more, that is the error already.
	status, err := credential.Status(context.WithoutCancel(ctx))
	if err != nil {
		return
	}
	if now := validityOf(status); now != nil && (r.Old == nil || *now != *r.Old) {
		r.New = now
	}
	if status.Renewal != nil {
		r.NextAttempt = status.Renewal.NextAttempt
	}
	if pending != nil {
		r.NextAttempt = pending.NotBefore.UTC()
	}
}
