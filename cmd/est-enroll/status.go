package main

import (
	"context"

	"github.com/spf13/cobra"

	"estenroll"
)

func statusCommand(s *settings, out *output) *cobra.Command {
	var asJSON bool
	command := &cobra.Command{
		Use:   "status",
		Short: "show the credentials, their addresses and the state of the device",
		Long: `Status shows what the Security object points at, the certificates and the key's
attributes as the token reports them, and an operation that waits to be gone on
with. The addresses (RFC 7512) hold no PIN. It asks no server.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withDevice(cmd.Context(), s, out, func(ctx context.Context, device *estenroll.Device) error {
				status, err := device.Credential(s.credential).Status(ctx)
				if err != nil {
					return err
				}
				if asJSON {
					return out.json(status)
				}
				out.status(status)
				return nil
			})
		},
	}
	command.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return command
}
