package main

import (
	"github.com/spf13/cobra"

	"estenroll"
)

func enrollCommand(s *settings, out *output) *cobra.Command {
	command := &cobra.Command{
		Use:   "enroll",
		Short: "get the first certificate; nothing to do if there is one",
		Long: `Enroll is the first boot: it generates a key in the HSM, gets a certificate for it
with the factory credential (IDevID), stores it in the HSM, proves it to the
server and makes the Security object point at it. With server-keygen the server
makes the key, which is imported into the HSM, with a warning: it has been outside
of it; an HSM that imports none is found out before anything is asked. On a device that is enrolled
it does nothing and exits 0. It first finishes what an interrupted run left.

` + hooksHelp,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			w := &work{
				settings: s, out: out, show: out.outcome,
				task: func(c *estenroll.Credential) task { return task{c.Enroll, c.PlanEnroll} },
			}
			return w.do(cmd.Context())
		},
	}
	s.registerWait(command.Flags())
	return command
}
