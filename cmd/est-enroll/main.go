// Command est-enroll gets, keeps and renews a device's certificate with a
// private key that never leaves its hardware security module (HSM), over EST
// (RFC 9148). See est-enroll --help, which suffices alone.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		stop() // a second Ctrl-C ends the program at once; the journal survives that too
	}()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

const rootHelp = `est-enroll gets a certificate for a key that is born in a hardware security
module (HSM) and never leaves it, and renews it, over EST (RFC 7030) carried by
CoAPs (RFC 9148). What it enrols is described by the entries of the LwM2M
Security object in the state directory.

A run that is killed at any moment loses nothing: the next one goes on.

Settings come from flags, then the environment (EST_ENROLL_STATE_DIR for
--state-dir), then the configuration file, which is YAML with the names of the
flags as keys. PINs are never flags: name a file with pin-source in the engine's
address.

Example of /etc/est-enroll/config.yaml:

  engine: pkcs11:token=device?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/est-enroll/pin
  server: coaps://est.example.com
  trust-anchors: /etc/est-enroll/ca.pem
  idevid-key: pkcs11:object=idevid;type=private
  idevid-certificate: pkcs11:object=idevid;type=cert

` + exitCodeHelp

// run is main without the process around it.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	out := newOutput(stdout, stderr)
	began := false
	var s settings
	root := &cobra.Command{
		Use:           "est-enroll",
		Short:         "get and renew a certificate whose key never leaves the HSM",
		Long:          rootHelp,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			began = true
			out.quiet, out.verbose = s.quiet, s.verbose
			return s.complete(cmd.Flags(), os.LookupEnv)
		},
	}
	s.register(root.PersistentFlags())
	root.AddCommand(enrollCommand(&s, out), renewCommand(&s, out), statusCommand(&s, out))
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err != nil && !began {
		err = &usageError{err}
	}
	if err == nil {
		return exitDone
	}
	return out.fail(err, ctx.Err() != nil)
}

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}
