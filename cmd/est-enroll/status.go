package main

import (
	"context"
	"errors"
	"fmt"

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
with. The addresses (RFC 7512) hold no PIN. It asks no server. Credentials that
the journal has and the configuration has no more are shown too.

Where the configuration has "credentials:", --json prints an object by their
names, with --credential the one alone, as without "credentials:".

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
			all := map[string]*estenroll.Status{}
			err := withDevice(cmd.Context(), s, out, func(ctx context.Context, device *estenroll.Device) error {
				turns, err := s.turns(device, uri.word == "")
				if err != nil {
					return err
				}
				return out.inTurn(ctx, turns, func(ctx context.Context, t turn) error {
					if uri.word != "" {
						return t.printURIs(ctx, t.credential, out, uri.word)
					}
					status, err := t.credential.Status(ctx)
					if err != nil {
						return err
					}
					all[t.credential.Name()] = status
					if !asJSON {
						out.status(status)
					}
					return nil
				})
			})
			if asJSON {
				if lost := printJSON(s, all, out); lost != nil {
					err = errors.Join(err, lost)
				}
			}
			return err
		},
	}
	command.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	command.Flags().Var(&uri, "uri", "print the addresses for other programs alone")
	command.Flags().Lookup("uri").NoOptDefVal = "both"
	return command
}

// printJSON prints what a command has for programs of each credential.
func printJSON[T any](s *settings, all map[string]*T, out *output) error {
	if s.byName() {
		return out.json(all)
	}
	for name := range all {
		if name != s.credential {
			out.warning(fmt.Sprintf("credential %q is not in the configuration and not shown: est-enroll status shows it", name))
		}
	}
	if one := all[s.credential]; one != nil {
		return out.json(one)
	}
	return nil
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
