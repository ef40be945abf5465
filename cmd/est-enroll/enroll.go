package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"estenroll"
)

func enrollCommand(s *settings, out *output) *cobra.Command {
	return &cobra.Command{
		Use:   "enroll",
		Short: "get the first certificate; nothing to do if there is one",
		Long: `Enroll is the first boot: it generates a key in the HSM, gets a certificate for it
with the factory credential (IDevID), stores it in the HSM, proves it to the
server and makes the Security object point at it. On a device that is enrolled
it does nothing and exits 0. It first finishes what an interrupted run left.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withDevice(cmd.Context(), s, out, func(ctx context.Context, device *estenroll.Device) error {
				credential := device.Credential(s.credential)
				result, err := credential.Enroll(ctx)
				if err == nil {
					out.outcome(result)
				}
				return errors.Join(err, s.export(ctx, credential, out))
			})
		},
	}
}

// withDevice opens the device, does something with it and closes it.
func withDevice(ctx context.Context, s *settings, out *output, do func(context.Context, *estenroll.Device) error) error {
	device, err := s.openDevice(ctx, out)
	if err != nil {
		return err
	}
	return errors.Join(do(ctx, device), device.Close())
}
