package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"estenroll/testserver"
)

func faultCommand() *cobra.Command {
	var control testserver.Control
	cmd := &cobra.Command{
		Use:   "fault --control PATH [none | FAULT...]",
		Short: "Show or replace the faults of a running server",
		Long: `Show or replace the faults of a running server; "none" ends them all. The faults
that are on afterwards are printed, one a line. Deferrals are counted anew.

Faults:

` + testserver.FaultsHelp,
		Example: `  est-testserver fault --control ca/control defer=2,max-age=1s wrong-key
  est-testserver fault --control ca/control refuse-client=issued refuse-code=4.03
  est-testserver fault --control ca/control none`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var faults []string
			var err error
			switch {
			case len(args) == 0:
				faults, err = control.Faults()
			case len(args) == 1 && args[0] == "none":
				faults, err = control.SetFaults(nil)
			default:
				faults, err = control.SetFaults(args)
			}
			for _, fault := range faults {
				fmt.Fprintln(cmd.OutOrStdout(), fault)
			}
			return err
		},
	}
	controlFlag(cmd, &control.Path)
	return cmd
}
