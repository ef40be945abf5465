package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"estenroll"
)

func renewCommand(s *settings, out *output) *cobra.Command {
	var force, rekey, dry, detailed, asJSON bool
	var unusable error // what is wrong with the settings, of which --json tells too
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

A certificate that has expired, that the token has lost, or that the server
refuses beside its successor is enrolled again with the factory credential
(IDevID), unless no-fallback is set.

A rekey generates a new key in the HSM beside the old one, of the configured
key-type, and gets the certificate for that; with server-keygen the server makes
it, and it is imported. The old key stays, with its
certificate, until the next completed renewal. Every rekey-every-th renewal of a
key is one, forced or not; where it comes to nothing, the same run renews the
current key, and status shows why until one is done. With --rekey, beside
--force, it is a rekey whatever rekey-every says. A key that the configuration
names (key) is not replaced.

With --dry-run it changes nothing and asks for no certificate, but does all that
comes before: it opens the token and the pair that is used, has the server answer
crts and judges it, asks it what it wants of the request (att), and has the token
sign that; a key is not generated. It says what a run would do and when, and what
the server wants, also where nothing is due, and exits as a run would that comes so
far. A wrong PIN costs a try and is remembered.

With --json it prints one object, whatever the run comes to, unless a flag is not
understood:

  name          of the credential
  action        none, renewed, rekeyed, enrolled, unchanged, pending, interrupted or failed
  reason        not due, waiting, due, expired, lost, unfinished or forced
  error         why it is pending, interrupted or failed
  old, new      the certificate before, and the one that took its place: serial,
                not_before, not_after, server_made (its key, outside of the HSM)
  next_attempt  when a run does something again
  hooks         those that were called: hook, path, error
  plan          of a dry run: kind, now, at, step (of what was begun), new_key,
                server_made, wants (of the server, in words; missing where it was
                not asked)

Where the configuration has "credentials:", it is an object by their names.

` + hooksHelp + ``,
		Example: `  */5 * * * *  root  est-enroll renew    # /etc/cron.d/est-enroll`,
		Args:    noArguments,
		PersistentPreRunE: func(cmd *cobra.Command, args []string) error {
			unusable = cmd.Root().PersistentPreRunE(cmd, args)
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if unusable == nil && rekey && !force {
				unusable = &usageError{errors.New("renew: --rekey is done now: it wants --force")}
			}
			w := &work{
				settings: s, out: out, forced: force, asJSON: asJSON, observed: asJSON,
				task: func(c *estenroll.Credential) task { return renewTask(c, force, rekey) },
				show: func(result *estenroll.Result) {
					if result != nil && result.Kind != "" {
						out.outcome(result)
					}
				},
			}
			do := w.do
			switch {
			case unusable != nil:
				do = func(context.Context) error { return w.refuse(unusable) }
			case dry:
				do = w.rehearse
			}
			err := do(cmd.Context())
			if asJSON {
				if lost := printJSON(s, w.reports, out); lost != nil {
					err = errors.Join(err, lost)
				}
			}
			if err == nil && detailed && w.changed() {
				return &toldError{exitRenewed}
			}
			return err
		},
	}
	command.Flags().BoolVar(&force, "force", false, "renew now, whatever the age of the certificate")
	command.Flags().BoolVar(&rekey, "rekey", false, "get the certificate for a new key, which is generated; with --force")
	command.Flags().BoolVar(&dry, "dry-run", false, "do everything but ask for a certificate, change nothing, and say what a run would do")
	s.registerWait(command.Flags())
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
