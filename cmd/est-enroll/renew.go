package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"
)

func renewCommand(s *settings, out *output) *cobra.Command {
	var force bool
	command := &cobra.Command{
		Use:   "renew --force",
		Short: "get a new certificate for the same key",
		Long: `Renew gets a new certificate for the key of the current one, which authenticates
the request, and keeps the current certificate as the previous one. It renews
now, whatever the age of the certificate: scheduling is not there yet, so
--force is required. It first finishes what an interrupted run left.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !force {
				return &usageError{errors.New("renew: scheduling is not there yet: renew --force renews now")}
			}
			return withCredentials(cmd.Context(), s, out, func(ctx context.Context, t turn) error {
				result, err := t.credential.Renew(ctx)
				if err == nil {
					out.outcome(result)
				}
				return t.export(ctx, t.credential, out, err)
			})
		},
	}
	command.Flags().BoolVar(&force, "force", false, "renew now, whatever the age of the certificate")
	return command
}
