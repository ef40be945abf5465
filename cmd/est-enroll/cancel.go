package main

import (
	"context"

	"github.com/spf13/cobra"

	"estenroll"
	"estenroll/engine"
)

func cancelCommand(s *settings, out *output) *cobra.Command {
	return &cobra.Command{
		Use:   "cancel",
		Short: "end a pending request, or another operation that was begun",
		Long: `Cancel ends an operation that was begun and is not committed: a request that the
server keeps pending, or a certificate that is not proven yet. A key that was
generated for it and a certificate that was stored are destroyed, which nothing
uses; the current pair stays. It asks no server, which goes on with a request that
it has. An operation that is committed is completed instead. Where there is
nothing to cancel it exits 0.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withCredentials(cmd.Context(), s, out, func(ctx context.Context, t turn) error {
				ended, err := t.credential.Cancel(ctx)
				if err == nil {
					out.cancelled(ended)
				}
				return t.export(ctx, t.credential, out, err)
			})
		},
	}
}

// cancelled prints what a cancellation has ended, and what went with it.
func (o *output) cancelled(ended *estenroll.Cancellation) {
	switch {
	case ended == nil:
		o.result("nothing to cancel")
		return
	case ended.Completed != nil:
		o.result("not cancelled: the %s was committed already, and is completed", ended.Kind)
		o.outcome(ended.Completed)
		return
	}
	o.result("cancelled: the %s that stood at step %s; destroyed:", ended.Kind, ended.Step)
	none := true
	for _, doomed := range []struct {
		name string
		at   engine.Address
	}{{"key:         ", ended.Key}, {"certificate: ", ended.Certificate}} {
		if doomed.at != nil {
			o.result("%s%s", doomed.name, doomed.at)
			none = false
		}
	}
	if none {
		o.result("nothing but the request")
	}
}
