package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"estenroll"
	"estenroll/engine"
)

func statusCommand(s *settings, out *output) *cobra.Command {
	var asJSON bool
	uri := oneOf{allowed: []string{"both", "key", "certificate", "chain"}}
	command := &cobra.Command{
		Use:   "status",
		Short: "show the credentials, their addresses and the state of the device",
		Long: `Status shows what the Security object points at, the certificates and the key's
attributes as the token reports them, and an operation that waits to be gone on
with. The addresses (RFC 7512) hold no PIN. It asks no server.

With --uri it prints the addresses of the enrolled credential as other programs
take them, one a line: the key's, which says with pin-source where the PIN is,
then the certificate's. --uri=key, --uri=certificate and --uri=chain print one
kind alone. Without an enrolled credential it fails.`,
		Example: `  openssl s_client -engine pkcs11 -keyform engine -key "$(est-enroll status --uri=key)" …`,
		Args:    noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asJSON && uri.word != "" {
				return &usageError{errors.New("status: --json has the addresses already: leave --uri out")}
			}
			return withDevice(cmd.Context(), s, out, func(ctx context.Context, device *estenroll.Device) error {
				credential := device.Credential(s.credential)
				if uri.word != "" {
					return s.printURIs(ctx, credential, out, uri.word)
				}
				status, err := credential.Status(ctx)
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
	command.Flags().Var(&uri, "uri", "print the addresses for other programs alone")
	command.Flags().Lookup("uri").NoOptDefVal = "both"
	return command
}

func (s *settings) printURIs(ctx context.Context, credential *estenroll.Credential, out *output, which string) error {
	public, err := credential.Public(ctx)
	if err != nil {
		return err
	}
	key, certificates := []engine.Address{public.Key}, public.Certificates
	for _, at := range map[string][]engine.Address{
		"key": key, "certificate": certificates[:1], "chain": certificates[1:], "both": append(key, certificates[0]),
	}[which] {
		out.result("%s", s.forPrograms(at))
	}
	return nil
}
