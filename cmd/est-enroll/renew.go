package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"
)

func renewCommand(s *settings, out *output) *cobra.Command {
	var force, rekey bool
	command := &cobra.Command{
		Use:   "renew --force [--rekey]",
		Short: "get a new certificate, for the same key or a new one",
		Long: `Renew gets a new certificate for the key of the current one, which authenticates
the request, and keeps the current certificate as the previous one. It renews
now, whatever the age of the certificate: scheduling is not there yet, so
--force is required. It first finishes what an interrupted run left.

With --rekey it generates a new key in the HSM beside the old one, of the
configured key-type, and gets the certificate for that. The old key stays, with
its certificate, until the next completed renewal. A key that the configuration
names (key) is not replaced.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !force {
				return &usageError{errors.New("renew: scheduling is not there yet: renew --force renews now")}
			}
			return withCredentials(cmd.Context(), s, out, func(ctx context.Context, t turn) error {
				renew := t.credential.Renew
				if rekey {
					renew = t.credential.Rekey
				}
				result, err := renew(ctx)
				if err == nil {
					out.outcome(result)
				}
				return t.export(ctx, t.credential, out, err)
			})
		},
	}
	command.Flags().BoolVar(&force, "force", false, "renew now, whatever the age of the certificate")
	command.Flags().BoolVar(&rekey, "rekey", false, "get the certificate for a new key, which is generated")
	return command
}
