package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"estenroll"
	"estenroll/internal/agent"
)

const hookGrace = 5 * time.Second // between SIGTERM and SIGKILL

const hooksHelp = `Hooks are files that are executed without a shell and without arguments, as the
user of the run, in "/":

  hook-before   when the run is about to act; its failure stops nothing
  hook-after    when there is a new certificate: by each run until it has
                succeeded, whatever else the run comes to
  hook-failure  when an attempt failed: not while the server has not decided, nor
                where another run is at work, nor after Ctrl-C

Neither the state directory nor the token is locked meanwhile. What they print is on
standard error. One that fails makes an exit code of 0 or 10 one of 1, and undoes
nothing; after hook-timeout it is ended with all that it has started. Of the
environment of the run they get PATH, HOME, USER, LOGNAME, SHELL, TMPDIR, TZ, the
language, SOFTHSM2_CONF, TPM2_PKCS11_STORE and TPM2_PKCS11_TCTI, and then, each set, if to nothing:

  EST_ENROLL_HOOK                         before, after or failure
  EST_ENROLL_NAME                         of the credential
  EST_ENROLL_ACTION, _REASON, _ERROR      as renew --json has them; before: renew,
                                          rekey or enroll
  EST_ENROLL_OLD_SERIAL, _OLD_NOT_AFTER   of the certificate before
  EST_ENROLL_NEW_SERIAL, _NEW_NOT_AFTER   after: of the one in its place
  EST_ENROLL_KEY_URI, _CERTIFICATE_URI    after: as status --uri prints them
  EST_ENROLL_NEXT_ATTEMPT                 when a run does something again
  EST_ENROLL_EXIT_CODE                    of the run, for this credential

A run that a hook begins calls none.`

// work is what a command does with its credentials, with their hooks around it.
type work struct {
	*settings
	out  *output
	task func(*estenroll.Credential) task
	// forced is the reason of what is done, whatever the policy says.
	forced bool
	// show prints what came of one, unless asJSON.
	show   func(*estenroll.Result)
	asJSON bool
	// observed says that a program, perhaps a hook, wants the reports whole, which
	// costs some calls into the token.
	observed bool

	reports map[string]*report
	failed  []error // of hooks
}

// do gives each credential its turn. The hooks are called while no lock is held and no
// token is open: before, on the plan of the run, and after it. A hook that fails is no
// reason not to renew, nor to undo anything; where all else is well it is the error.
func (w *work) do(ctx context.Context) error {
	w.begin()
	err := w.checkHooks()
	if err == nil {
		err = w.before(ctx)
	}
	if err == nil {
		err = withCredentials(ctx, w.settings, w.out, w.turn)
	}
	w.concludeOthers(err)
	w.after(ctx)
	switch {
	case err == nil && ctx.Err() != nil:
		return ctx.Err()
	case err == nil:
		return errors.Join(w.failed...)
	}
	for _, failed := range w.failed {
		w.out.warning(oneLine(failed))
	}
	return err
}

// refuse is do where it cannot begin.
func (w *work) refuse(err error) error {
	w.begin()
	w.concludeOthers(err)
	return err
}

// begin makes a report for each credential that the command is for, and for the one
// that is chosen where the configuration has no such.
func (w *work) begin() {
	w.reports = map[string]*report{}
	if w.chosen {
		w.reports[w.credential] = &report{Name: w.credential}
	}
	for _, one := range w.treated() {
		w.reports[one.credential] = &report{Name: one.credential}
	}
}

// concludeOthers says what the end of the run is to those that had no turn.
func (w *work) concludeOthers(err error) {
	for _, r := range w.reports {
		if r.had {
			continue
		}
		r.conclude(nil, err)
		var told *toldError
		if errors.As(err, &told) {
			r.Error = noTurn
		}
	}
}

// turn does the task with one credential.
func (w *work) turn(ctx context.Context, t turn) error {
	r := w.reports[t.credential.Name()]
	r.had = true
	if w.observed {
		if err := r.before(ctx, t.credential, w.forced); err != nil {
			r.conclude(nil, err)
			return err
		}
	}
	result, err := w.task(t.credential).run(ctx)
	r.conclude(result, err)
	if w.observed {
		r.after(ctx, t.credential, err)
	}
	if err == nil && !w.asJSON {
		w.show(result)
	}
	if t.hookAfter != "" && (err == nil || !isOfAll(err)) {
		if err := r.describe(ctx, t); err != nil && !errors.Is(err, estenroll.ErrNotEnrolled) {
			w.failed = append(w.failed, w.of(t.settings, err))
		}
	}
	if err = t.export(ctx, t.credential, w.out, err); errors.Is(err, agent.ErrExport) {
		r.Error, r.outcome = oneLine(err), err
	}
	return err
}

// describe notes the certificate in place, for hook-after.
func (r *report) describe(ctx context.Context, t turn) error {
	public, err := t.credential.Public(context.WithoutCancel(ctx))
	if err != nil {
		return err
	}
	r.certificate = public.Chain[0]
	r.keyURI, r.certificateURI = t.forPrograms(public.Key), t.forPrograms(public.Certificates[0])
	return nil
}

// changed reports whether there is a new certificate, or would be.
func (w *work) changed() bool {
	for _, r := range w.reports {
		if r.changed() || r.Plan != nil && r.Plan.Acts {
			return true
		}
	}
	return false
}

// treated are the settings of the credentials that the command is for.
func (s *settings) treated() []*settings {
	return slices.DeleteFunc(slices.Clone(s.all()), func(one *settings) bool { return s.chosen && one.credential != s.credential })
}

// checkHooks refuses hooks that cannot be run before anything is done, and takes the
// hooks away from a run that one of them has called: it would call itself for ever.
func (w *work) checkHooks() error {
	if os.Getenv(agent.HookVariable) != "" {
		for _, one := range w.treated() {
			one.hookBefore, one.hookAfter, one.hookFailure = "", "", ""
		}
	}
	hooks, err := w.settings.checkHooks(w.out.warning)
	w.observed = w.observed || hooks
	return err
}

// checkHooks says whether there are hooks, and refuses those that cannot be run.
func (s *settings) checkHooks(warn func(string)) (any bool, err error) {
	warned := map[string]bool{}
	for _, one := range s.treated() {
		for _, hook := range []struct{ name, path string }{
			{agent.HookBefore, one.hookBefore}, {agent.HookAfter, one.hookAfter}, {agent.HookFailure, one.hookFailure},
		} {
			if hook.path == "" {
				continue
			}
			any = true
			warning, err := agent.CheckHook(hook.path)
			if err != nil {
				return any, &usageError{s.of(one, fmt.Errorf("hook-%s: %w", hook.name, err))}
			}
			if warning != "" && !warned[warning] {
				warned[warning] = true
				warn("hook-" + hook.name + ": " + warning)
			}
		}
	}
	return any, nil
}

// before calls hook-before of each credential that the run will act on. The device is
// opened for the plan, and closed again. An error is the run's.
func (w *work) before(ctx context.Context) error {
	if !slices.ContainsFunc(w.treated(), func(one *settings) bool { return one.hookBefore != "" }) {
		return nil
	}
	silent := *w.out
	silent.quiet = true // the run says the same again
	plans := map[string]*estenroll.Plan{}
	err := withCredentials(ctx, w.settings, &silent, func(ctx context.Context, t turn) error {
		if t.hookBefore == "" {
			return nil
		}
		plan, err := w.task(t.credential).plan(ctx)
		if err == nil && plan != nil && plan.Acts { // an error, the run comes to itself
			plans[t.credential.Name()] = plan
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, one := range w.treated() {
		if plan := plans[one.credential]; plan != nil {
			w.reports[one.credential].Action = string(plan.Kind)
			w.call(ctx, one, agent.HookBefore, one.hookBefore, agent.Hook.Run)
		}
	}
	return ctx.Err()
}

// after calls the hooks that the outcome is for. hook-after is owed for a certificate
// until it has succeeded, whatever this run has come to: but not before the files for
// other programs are right.
func (w *work) after(ctx context.Context) {
	told := w.told(w.out)
	for _, one := range w.treated() {
		r := w.reports[one.credential]
		if one.hookFailure != "" && isFailure(r.outcome) {
			w.call(ctx, one, agent.HookFailure, one.hookFailure, agent.Hook.Run)
		}
		if one.hookAfter != "" && r.certificate != nil && !errors.Is(r.outcome, agent.ErrExport) {
			w.call(ctx, one, agent.HookAfter, one.hookAfter, func(hook agent.Hook, ctx context.Context) error {
				ran, err := told.Tell(ctx, r.Name, r.certificate, hook)
				if !ran && err == nil {
					return errNotOwed
				}
				return err
			})
		}
	}
}

// told is the memory of hook-after.
func (s *settings) told(out *output) agent.Told {
	return agent.Told{Dir: s.stateDir, LockTimeout: s.lockTimeout, Command: s.command, Warn: out.warning}
}

// errNotOwed says that there is nothing to tell a hook of.
var errNotOwed = errors.New("the hook was told already")

// isFailure reports an attempt that failed: one that waits for the server's decision,
// for another run, or was interrupted did not, and a mistake in the settings is none.
func isFailure(err error) bool {
	if err == nil || isUsage(err) || errors.Is(err, estenroll.ErrBusy) {
		return false
	}
	code := judge(err, false).code
	return code != exitPending && code != exitInterrupted
}

// call runs a hook and notes what came of it. What it prints is on standard error,
// behind its name. Ctrl-C ends it, and no other is begun: what is owed is owed to the
// next run.
func (w *work) call(ctx context.Context, one *settings, name, path string, run func(agent.Hook, context.Context) error) {
	if ctx.Err() != nil {
		return
	}
	if w.byName() {
		w.out.about = one.credential
		defer func() { w.out.about = "" }()
	}
	r, start := w.reports[one.credential], time.Now()
	err := run(agent.Hook{
		Name: name, Path: path, Timeout: one.hookTimeout, Grace: hookGrace, Variables: r.variables(name),
		Line: func(text string) { w.out.hook(name, text) },
	}, ctx)
	noted := hookReport{Hook: name, Path: path}
	switch {
	case errors.Is(err, errNotOwed):
		return
	case err == nil:
		w.out.progress(estenroll.Event{Step: "hook", Message: name + ": " + path + " has run", Elapsed: max(time.Since(start), 1)})
	default:
		noted.Error = oneLine(err)
		w.failed = append(w.failed, w.of(one, err))
	}
	r.Hooks = append(r.Hooks, noted)
}

// hookReport is what came of a hook.
type hookReport struct {
	Hook  string `json:"hook"`
	Path  string `json:"path"`
	Error string `json:"error,omitempty"`
}

// variables are the environment of a hook.
func (r *report) variables(hook string) map[string]string {
	v := map[string]string{
		agent.NameVariable: r.Name, agent.ActionVariable: r.Action, agent.ReasonVariable: r.Reason, agent.ErrorVariable: printable(r.Error),
		agent.KeyURIVariable: r.keyURI, agent.CertificateURIVariable: r.certificateURI,
	}
	if r.certificate != nil && hook == agent.HookAfter {
		v[agent.NewSerialVariable], v[agent.NewNotAfterVariable] = hex.EncodeToString(r.certificate.SerialNumber.Bytes()), stamp(r.certificate.NotAfter)
	}
	if r.Old != nil && v[agent.NewSerialVariable] != r.Old.Serial { // it is the same where an earlier run could not tell
		v[agent.OldSerialVariable], v[agent.OldNotAfterVariable] = r.Old.Serial, stamp(r.Old.NotAfter)
	}
	if !r.NextAttempt.IsZero() {
		v[agent.NextAttemptVariable] = stamp(r.NextAttempt)
	}
	if hook != agent.HookBefore {
		v[agent.ExitCodeVariable] = strconv.Itoa(r.exitCode())
	}
	return v
}

func (r *report) exitCode() int {
	if r.outcome == nil {
		return exitDone
	}
	return judge(r.outcome, false).code
}
