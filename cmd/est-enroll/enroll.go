package main

import (
	"context"

	"github.com/spf13/cobra"
)

func enrollCommand(s *settings, out *output) *cobra.Command {
	command := &cobra.Command{
		Use:   "enroll",
		Short: "get the first certificate; nothing to do if there is one",
		Long: `Enroll is the first boot: it generates a key in the HSM, gets a certificate for it
with the factory credential (IDevID), stores it in the HSM, proves it to the
server and makes the Security object point at it. On a device that is enrolled
it does nothing and exits 0. It first finishes what an interrupted run left.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withCredentials(cmd.Context(), s, out, func(ctx context.Context, t turn) error {
				result, err := t.credential.Enroll(ctx)
				if err == nil {
					out.outcome(result)
				}
				return t.export(ctx, t.credential, out, err)
			})
		},
	}
	s.registerWait(command.Flags())
	return command
}
