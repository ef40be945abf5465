package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

func configCommand() *cobra.Command {
	var example bool
	command := &cobra.Command{
		Use:   "config --example",
		Short: "print a configuration file to begin with",
		Long: `Config --example prints a complete configuration file: every setting with what it
means and its default. Those that have no default and are required are set to an
example, all others are comments. It reads no configuration.`,
		Example: "  est-enroll config --example >/etc/est-enroll/config.yaml",
		Args:    noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !example {
				return &usageError{errors.New("config: want --example")}
			}
			return writeExample(cmd.OutOrStdout(), cmd.Root().PersistentFlags())
		},
	}
	command.Flags().BoolVar(&example, "example", false, "print it")
	return command
}

// examples are values for the settings that have no default.
var examples = map[string][]string{
	"engine":                      {"pkcs11:token=device?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/est-enroll/pin"},
	"server":                      {"coaps://est.example.com"},
	"trust-anchors":               {"/etc/est-enroll/ca.pem"},
	"label":                       {"factory-2"},
	"http-user":                   {"dev-17"},
	"http-password-file":          {"/etc/est-enroll/http-password"},
	"psk-identity":                {"dev-17"},
	"psk-key-file":                {"/etc/est-enroll/psk"},
	"key":                         {"pkcs11:object=idevid;type=private"},
	"key-usage":                   {"digitalSignature"},
	"ext-key-usage":               {"clientAuth", "serverAuth"},
	"idevid-chain":                {"/etc/est-enroll/idevid-chain.pem"},
	"subject":                     {"CN=dev-17,O=Example"},
	"san":                         {"DNS:dev-17.example.com", "IP:192.0.2.17"},
	"security-server":             {"coaps://lwm2m.example.com"},
	"security-server-certificate": {"/etc/est-enroll/lwm2m-server.pem"},
	"exchange-timeout":            {"5m0s"},
	"export-dir":                  {"/var/lib/est-enroll-public"},
	"hook-before":                 {"/etc/est-enroll/before"},
	"hook-after":                  {"/etc/est-enroll/after"},
	"hook-failure":                {"/etc/est-enroll/failure"},
}

const exampleHead = `# est-enroll: every setting, with its default or an example.
# Flags go before the environment, which goes before this file: --state-dir, then
# EST_ENROLL_STATE_DIR, then state-dir.
# What stands behind a "#" without a space is a setting, with the indented lines below it.
`

const exampleCredentials = `
# Several credentials, each with what differs from the settings above; without
# "credential" there. A command treats all of them, or that of --credential.
#credentials:
#    device: {}
#    mqtt:
#        subject: CN=mqtt-17
#        security-instance: 1
`

// writeExample prints the settings as a configuration file: the flags are the one
// list of them.
func writeExample(w io.Writer, flags *pflag.FlagSet) error {
	var text strings.Builder
	text.WriteString(exampleHead)
	var failed error
	flags.VisitAll(func(f *pflag.Flag) {
		if onlyFlags[f.Name] {
			return
		}
		lines, err := exampleOf(f)
		failed = errors.Join(failed, err)
		_, usage := pflag.UnquoteUsage(f)
		fmt.Fprintf(&text, "\n%s", wrapComment(usage))
		for _, line := range lines {
			if !slices.Contains(requiredSettings, f.Name) {
				line = "#" + line
			}
			text.WriteString(line + "\n")
		}
	})
	if failed != nil {
		return failed
	}
	text.WriteString(exampleCredentials)
	_, err := io.WriteString(w, text.String())
	return err
}

// exampleOf returns the lines that set a flag to its default, or to an example
// where it has none.
func exampleOf(f *pflag.Flag) ([]string, error) {
	texts, has := examples[f.Name]
	if !has {
		texts = []string{f.DefValue}
	}
	var value any = texts[0]
	switch f.Value.Type() {
	case "stringArray":
		value = examples[f.Name] // none is the default of each list
	case "bool", "int", "uint", "uint16", "duration":
		return []string{fmt.Sprintf("%s: %s", f.Name, value)}, nil // as they are: quoted, they would look like texts
	}
	data, err := yaml.Marshal(map[string]any{f.Name: value})
	if err != nil {
		return nil, fmt.Errorf("example of %s: %w", f.Name, err)
	}
	return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n"), nil
}

const commentWidth = 80

// wrapComment makes lines of a comment of a sentence.
func wrapComment(sentence string) string {
	var text strings.Builder
	line := "#"
	for _, word := range strings.Fields(sentence) {
		if len(line)+1+len(word) > commentWidth {
			text.WriteString(line + "\n")
			line = "#"
		}
		line += " " + word
	}
	text.WriteString(line + "\n")
	return text.String()
}
