package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"estenroll"
	"estenroll/internal/agent"
)

func doctorCommand(s *settings, out *output, began func()) *cobra.Command {
	var asJSON bool
	var unusable error // what is wrong with the settings is a finding, not an error of the command line
	command := &cobra.Command{
		Use:   "doctor",
		Short: "check whether the device will renew by itself, and what to do if not",
		Long: `Doctor makes six checks, a line each, and says what to do about what it finds:

  configuration  the settings and the state directory; who is at work in it
  token          the module and the token
  PIN            where it comes from, and whether the token takes it; one that was
                 refused before is not tried, nor is the last try of a token
  pair           of each credential: the key, its attributes as the token reports
                 them, the certificate and its chain, the Security object, the
                 IDevID as the way back; what earlier runs have left
  clock          beside what the device has verified, and its certificates
  server         of each credential: path (name, datagrams), handshake with the pair
                 that the next run shows, EST root (crts, and the server judged by it);
                 the one that fails is the firewall's, the trust's or the path's matter

A check is ok, a warning, failed, or skipped for another one that comes first. A
device that is not enrolled yet is looked at for its first boot.

It changes nothing: it asks for no certificate, and the state directory and the
token stay as they are. Only a PIN that the token refuses is remembered, as by each
run, for the next would spend another try on it. It does not wait for another run.

The exit code says whether the device will renew by itself: 0 if so, with warnings
perhaps, else what a renewal would end with: 1 where the server does not answer or
another run is at work, 2 for the configuration or a device that is not enrolled, 3
for a request that is pending, 4 for the token or the PIN, 5 for what is refused.

With --json it prints one object: exit_code, and checks in this order, each with
check, credential, result, text and findings; a finding has result, text and advice.`,
		Args: noArguments,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			began()
			out.quiet, out.verbose = s.quiet, s.verbose
			unusable = s.complete(cmd.Flags(), os.LookupEnv)
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			configure := func(tell func(estenroll.Event)) (cfg estenroll.Config, err error) {
				if err = unusable; err == nil {
					cfg, err = s.lifecycle(out, tell)
				}
				if err == nil {
					_, err = s.checkHooks(func(text string) { tell(estenroll.Event{Warning: true, Message: text}) })
				}
				if err == nil {
					err = s.checkPassword(os.LookupEnv)
				}
				if err != nil && !isUsage(err) {
					err = &usageError{err}
				}
				return cfg, err
			}
			only := func(credential string) bool { return !s.chosen || credential == s.credential }
			diagnosis := agent.Examine(cmd.Context(), configure, only)
			code := exitDone
			for _, cause := range diagnosis.Causes() {
				code = worse(code, judge(cause, cmd.Context().Err() != nil).code)
			}
			for _, check := range diagnosis.Checks {
				for _, finding := range check.Findings {
					if finding.Advice == "" && finding.Err != nil {
						finding.Advice = judge(finding.Err, false).hint
					}
				}
			}
			if asJSON {
				report := struct {
					ExitCode int            `json:"exit_code"`
					Checks   []*agent.Check `json:"checks"`
				}{code, diagnosis.Checks}
				if err := out.json(report); err != nil {
					return err
				}
			} else {
				out.diagnosis(diagnosis)
			}
			return told(code)
		},
	}
	command.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return command
}

// diagnosis prints a line for each check, and below it what is not ok, with advice.
func (o *output) diagnosis(d *agent.Diagnosis) {
	several := map[string]bool{}
	for _, check := range d.Checks {
		several[check.Credential] = check.Credential != ""
	}
	defer func() { o.about = "" }()
	for _, check := range d.Checks {
		if o.about = ""; len(several) > 2 { // with "", which is the device's
			o.about = check.Credential
		}
		o.result("%s", strings.TrimSpace(fmt.Sprintf("%-8s %-14s %s", check.Result, check.Name, check.Text)))
		for _, finding := range check.Findings {
			o.result("         %s: %s", finding.Result, finding.Text)
			if finding.Advice != "" {
				o.result("           hint: %s", finding.Advice)
			}
		}
	}
}

// told is the outcome of what has been printed already.
func told(code int) error {
	if code == exitDone {
		return nil
	}
	return &toldError{code}
}
