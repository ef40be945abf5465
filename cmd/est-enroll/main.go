// Command est-enroll gets, keeps and renews a device's certificate with a
// private key that never leaves its hardware security module (HSM), over EST
// (RFC 7030, RFC 9148). See est-enroll --help, which suffices alone.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
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
module (HSM) and never leaves it, and renews it, over EST carried by HTTPS
(RFC 7030) or CoAPs (RFC 9148). What it enrols is described by the entries of the LwM2M
Security object in the state directory.

A run that is killed between any two calls into the PKCS#11 module loses nothing:
the next one goes on. What a module loses when it is killed inside its own writes
to the token, no program above it can give back.

Settings come from flags, then the environment (EST_ENROLL_STATE_DIR for
--state-dir), then the configuration file, which is YAML with the names of the
flags as keys. PINs are never flags: name a file with pin-source in the engine's
address, or give systemd's credential est-enroll-pin, or type the PIN when a
terminal asks for it.

Example of /etc/est-enroll/config.yaml:

  engine: pkcs11:token=device?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/est-enroll/pin
  server: coaps://est.example.com
  trust-anchors: /etc/est-enroll/ca.pem
  idevid-key: pkcs11:object=idevid;type=private
  idevid-certificate: pkcs11:object=idevid;type=cert

A device with several credentials lists them below "credentials", each with
what differs from the settings at the top. A command treats all, in this order,
or the one that --credential names:

  credentials:
    device: {}
    mqtt:
      subject: CN=mqtt-17
      security-instance: 1

` + exitCodeHelp

// run is main without the process around it.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	// Measured: net/http of Go 1.26 logs what a server sends beyond its Content-Length,
	// which may be of a key. Nothing here is said in this way.
	log.SetOutput(io.Discard)
	out := newOutput(stdout, stderr)
	began := false
	root := command(new(settings), out, func() { began = true })
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err != nil && !began {
		err = &usageError{err}
	}
	if err == nil {
		err = out.lost
	}
	if err == nil {
		return exitDone
	}
	return out.fail(err, ctx.Err() != nil)
}

// command is the whole command line. began is called when its words are
// understood: an error before that is one of usage.
func command(s *settings, out *output, began func()) *cobra.Command {
	root := &cobra.Command{
		Use:           "est-enroll",
		Short:         "get and renew a certificate whose key never leaves the HSM",
		Long:          rootHelp,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				// Not repeated: it may be a PIN in the wrong place.
				return &usageError{errors.New("unknown command: there are " + names(cmd.Commands()))}
			}
			return cmd.Help()
		},
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			began()
			switch {
			case cmd.Hidden: // a shell asks, whatever the configuration is
				completeFlags(cmd.Root().Commands())
				return nil
			case !cmd.HasParent(): // help
				return nil
			}
			s.command, out.quiet, out.verbose = cmd.CommandPath(), s.quiet, s.verbose
			for _, name := range unknownVariables(cmd.Flags(), os.Environ()) {
				out.warning("environment " + name + ": there is no such setting, it is ignored")
			}
			return s.complete(cmd.Flags(), os.LookupEnv)
		},
	}
	s.register(root.PersistentFlags())
	root.Flags().SortFlags = false
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return flagError(err) })
	root.AddCommand(enrollCommand(s, out), renewCommand(s, out), statusCommand(s, out), doctorCommand(s, out, began), cancelCommand(s, out), resetCommand(s, out), configCommand())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	help := root.HelpFunc()
	root.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		cmd.InheritedFlags().SortFlags = false // as the root shows them
		help(cmd, args)
	})
	for _, c := range root.Commands() {
		switch c.Name() {
		case "completion", "config", "help":
			// They read no configuration: the one that is there may be what they are
			// to help with.
			c.PersistentPreRunE = func(*cobra.Command, []string) error {
				began()
				return nil
			}
		default:
			c.ValidArgsFunction = cobra.NoFileCompletions
		}
	}
	return root
}

// names lists commands as a person would.
func names(commands []*cobra.Command) string {
	var list []string
	for _, c := range commands {
		if c.IsAvailableCommand() {
			list = append(list, c.Name())
		}
	}
	last := len(list) - 1
	return strings.Join(list[:last], ", ") + " and " + list[last]
}

// flagError says what is wrong with a flag without its value.
func flagError(err error) error {
	var invalid *pflag.InvalidValueError
	var unknown *pflag.NotExistError
	switch {
	case errors.As(err, &invalid):
		return fmt.Errorf("--%s: want %s", invalid.GetFlag().Name, wanted(invalid.GetFlag()))
	case errors.As(err, &unknown) && unknown.GetSpecifiedShortnames() != "":
		return fmt.Errorf("unknown flag: -%s", unknown.GetSpecifiedName())
	}
	return err
}

// noArguments is cobra.NoArgs, without repeating what was given.
func noArguments(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return errors.New("want no argument beside the flags")
	}
	return nil
}

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}
