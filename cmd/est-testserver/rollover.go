package main

import (
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"estenroll/internal/durable"
	"estenroll/testserver"
)

func rolloverCommand() *cobra.Command {
	var (
		control  testserver.Control
		to       testserver.Rollover
		writeDir string
	)
	cmd := &cobra.Command{
		Use:   "rollover --control PATH {announced | switched | finished}",
		Short: "Change the root of a running server's EST CA",
		Long: `Change the root of a running server's EST CA: another key of the same name
(RFC 4210 §4.4), with an issuing CA and a certificate of the server below it. It
begins a rollover, or brings the one that was begun further:

  announced  crts has the new root too, and the old one goes on issuing
  switched   the new one issues and the server's certificate is under it; clients
             with certificates under the old one are still accepted
  finished   the old root is gone from crts, and its clients are refused

crts has OldWithNew and NewWithOld too, and after the rollover NewWithOld
(RFC 7030 §4.1.3); with --no-links they are left out, and nobody vouches for the
new root. The SHA-256 fingerprint of the new root is printed.

Files in --write-dir, all PEM: old.pem, old-with-new.pem, new-with-old.pem and
new.pem.`,
		Example: `  est-testserver rollover --control ca/control announced
  est-testserver rollover --control ca/control switched
  est-testserver rollover --control ca/control finished --no-links`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			to.Phase = testserver.RolloverPhase(args[0])
			made, err := control.Rollover(to)
			if err != nil {
				return err
			}
			if err := writeRollover(writeDir, made); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%x\n", sha256.Sum256(made.NewWithNew.Raw))
			return nil
		},
	}
	controlFlag(cmd, &control.Path)
	cmd.Flags().BoolVar(&to.NoLinks, "no-links", false, "publish no certificate by which the old and the new root vouch for each other")
	cmd.Flags().StringVar(&writeDir, "write-dir", "", "write the four certificates to this `DIR`, created if missing")
	return cmd
}

func writeRollover(dir string, made testserver.RolloverCertificates) error {
	if dir == "" {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write certificates: %w", err)
	}
	for name, cert := range map[string]*x509.Certificate{
		"old.pem": made.OldWithOld, "old-with-new.pem": made.OldWithNew, "new-with-old.pem": made.NewWithOld, "new.pem": made.NewWithNew,
	} {
		if err := durable.WriteFile(filepath.Join(dir, name), certificatePEM(cert), 0o644); err != nil {
			return fmt.Errorf("write certificates: %w", err)
		}
	}
	return nil
}
