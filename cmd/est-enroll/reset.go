package main

import (
	"bufio"
	"context"
	"errors"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"estenroll"
	"estenroll/engine"
)

// errDeclined says that the person at the terminal did not say yes.
var errDeclined = errors.New("reset: not confirmed: nothing is changed")

func resetCommand(s *settings, out *output) *cobra.Command {
	var yes bool
	command := &cobra.Command{
		Use:   "reset",
		Short: "destroy the enrolled keys and certificates: back to the factory state",
		Long: `Reset brings the device back to its factory state: it destroys the keys that were
generated for its credentials and their certificates, removes what the state
directory knows of them, and makes the Security object point at the factory
credential (IDevID), which stays. A key cannot be brought back: it says what goes
and asks on the terminal; without a terminal --yes is required. With --credential
one credential is reset alone.

A reset that is interrupted is gone on with by the next run. What --export-dir
holds of a credential for other programs goes with it.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !yes && !term.IsTerminal(int(os.Stdin.Fd())) {
				return &usageError{errors.New("reset: it destroys keys for ever, and there is no terminal to ask on: say --yes")}
			}
			var forgotten []string
			err := withDevice(cmd.Context(), s, out, func(ctx context.Context, device *estenroll.Device) error {
				turns, err := s.turns(device, true)
				if err != nil {
					return err
				}
				plans := map[string]*estenroll.ResetPlan{}
				err = out.inTurn(ctx, turns, func(ctx context.Context, t turn) (err error) {
					plans[t.credential.Name()], err = t.credential.PlanReset(ctx)
					return err
				})
				if err != nil {
					return err // of all: none is reset
				}
				if !yes {
					if err := out.confirm(ctx, turns, plans); err != nil {
						return err
					}
				}
				return out.inTurn(ctx, turns, func(ctx context.Context, t turn) error {
					plan := plans[t.credential.Name()]
					if err := t.credential.Reset(ctx); err != nil {
						return err
					}
					out.wasReset(plan)
					forgotten = append(forgotten, t.credential.Name())
					return t.removeExport(t.credential)
				})
			})
			for _, name := range forgotten { // no lock is held by now: a hook may be at work
				if lost := s.told(out).Forget(cmd.Context(), name); lost != nil {
					err = errors.Join(err, lost)
				}
			}
			return err
		},
	}
	command.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return command
}

// confirm says what will be destroyed and asks for it on the terminal.
func (o *output) confirm(ctx context.Context, turns []turn, plans map[string]*estenroll.ResetPlan) error {
	empty := true
	for _, t := range turns {
		plan := plans[t.credential.Name()]
		empty = empty && plan.IsEmpty()
		for _, doomed := range doomed(plan) {
			o.prompt(t.credential.Name() + ": " + doomed + "\n")
		}
	}
	if empty {
		return nil
	}
	o.prompt("This is destroyed and cannot be brought back. Type yes to go on: ")
	answer := make(chan string, 1)
	go func() {
		line, err := bufio.NewReader(os.Stdin).ReadString('\n') // an end of it is a no
		if err != nil {
			o.prompt("\n")
		}
		answer <- strings.TrimSpace(line)
	}()
	select {
	case <-ctx.Done():
		o.prompt("\n")
		return ctx.Err()
	case line := <-answer:
		if line != "yes" {
			return errDeclined
		}
		return nil
	}
}

// doomed lists what a plan destroys, a line each.
func doomed(plan *estenroll.ResetPlan) (lines []string) {
	for _, kind := range []struct {
		name string
		at   []engine.Address
	}{{"key:         ", plan.Keys}, {"certificate: ", plan.Certificates}, {"chain:       ", plan.Chain}, {"anchor:      ", plan.Anchors}} {
		for _, at := range kind.at {
			lines = append(lines, kind.name+at.String())
		}
	}
	return lines
}

// wasReset prints what a reset came to.
func (o *output) wasReset(plan *estenroll.ResetPlan) {
	if plan.IsEmpty() {
		o.result("nothing to destroy: it is as it left the factory")
		return
	}
	o.result("reset: it is as it left the factory; destroyed, but for what others need of the chain:")
	for _, line := range doomed(plan) {
		o.result("%s", line)
	}
}
