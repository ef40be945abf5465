// Command est-testserver runs the EST CA for tests of package testserver, and
// speaks to a running one.
package main

import (
	"fmt"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"
)

const warning = "WARNING: for tests only. Its CA keys are made at start and protected by nothing: trust no certificate it issues."

func main() {
	if err := command().Execute(); err != nil {
		fmt.Fprintf(os.Stderr, "est-testserver: error: %v\n", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "est-testserver",
		Short: "An EST CA for tests of clients, over CoAPs (RFC 9148) and HTTPS (RFC 7030)",
		Long: `An EST CA for tests of clients, over CoAPs (RFC 9148) and HTTPS (RFC 7030).

` + warning + `

"serve" runs the server, all operations of EST below /.well-known/est, for clients
that hold an IDevID of its factory CA or a certificate it issued. "idevid", "fault"
and "rollover" ask a running server through its control socket: for a factory
certificate, for wrong answers, for another root.

  est-testserver serve --listen 127.0.0.1:0 --write-dir ca --control ca/control &
  est-testserver idevid --control ca/control --csr factory.csr --out idevid.der
  est-testserver fault --control ca/control defer=2,max-age=1s

testserver/README.md of the sources is the guide for those who test their own client.

Exit status: 0 done or stopped by SIGINT or SIGTERM, 1 anything else.`,
		Version:           version(),
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w: see %s --help", err, cmd.CommandPath())
	})
	root.AddCommand(serveCommand(), idevidCommand(), faultCommand(), rolloverCommand())
	return root
}

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}

// controlFlag adds the flag that says which server is meant.
func controlFlag(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVar(path, "control", "", "`PATH` of the running server's control socket")
	if err := cmd.MarkFlagRequired("control"); err != nil {
		panic(err) // the flag is defined one line above
	}
}
