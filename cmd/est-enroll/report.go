package main

import (
	"context"
	"crypto/x509"
	"errors"
	"time"

	"estenroll"
)

// report is what a command did with a credential, for a program.
type report struct {
	Name   string `json:"name"`
	Action string `json:"action"`
	// Reason is the state of the renewal before, or "forced".
	Reason string `json:"reason,omitempty"`
	Error  string `json:"error,omitempty"`
	// Old is the certificate that was current before, New one that took its place.
	Old         *validity `json:"old,omitempty"`
	New         *validity `json:"new,omitempty"`
	NextAttempt time.Time `json:"next_attempt,omitzero"`
	// Plan is what a run would do, of a dry run alone.
	Plan  *estenroll.Plan `json:"plan,omitempty"`
	Hooks []hookReport    `json:"hooks,omitempty"`

	had     bool  // its turn
	outcome error // of all that was done
	// certificate that is in place, and the addresses that other programs take.
	certificate            *x509.Certificate
	keyURI, certificateURI string
}

type validity struct {
	Serial    string    `json:"serial"` // hexadecimal
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	// ServerMade says that the server made the key, outside of the HSM.
	ServerMade bool `json:"server_made,omitempty"`
}

func validityOf(status *estenroll.Status) *validity {
	if !status.Enrolled || status.Current == nil || status.Current.Serial == "" {
		return nil
	}
	return &validity{status.Current.Serial, status.Current.NotBefore, status.Current.NotAfter, status.Current.ServerMade}
}

func (r *report) before(ctx context.Context, credential *estenroll.Credential, force bool) error {
	status, err := credential.Status(ctx)
	if err != nil {
		return err
	}
	r.Old = validityOf(status)
	switch {
	case force:
		r.Reason = "forced"
	case status.Renewal != nil:
		r.Reason = string(status.Renewal.State)
	}
	return nil
}

// conclude says what was done.
func (r *report) conclude(result *estenroll.Result, err error) {
	r.outcome = err
	var pending *estenroll.PendingError
	switch {
	case errors.As(err, &pending):
		r.Action, r.Error = "pending", oneLine(err)
	case errors.Is(err, context.Canceled):
		r.Action, r.Error = "interrupted", "interrupted: the next run goes on"
	case err != nil:
		r.Action, r.Error = "failed", oneLine(err)
	case result == nil || result.Kind == "":
		r.Action = "none"
	case !result.Changed:
		r.Action = "unchanged"
	case result.Kind == estenroll.KindEnroll:
		r.Action = "enrolled"
	case result.Kind == estenroll.KindRekey:
		r.Action = "rekeyed"
	default:
		r.Action = "renewed"
	}
}

func (r *report) changed() bool {
	return r.Action == "enrolled" || r.Action == "rekeyed" || r.Action == "renewed"
}

func (r *report) after(ctx context.Context, credential *estenroll.Credential, err error) {
	// What it says is true whatever the run has come to, Ctrl-C too. Where the token
	// does not answer any more, that is the error already.
	status, statusErr := credential.Status(context.WithoutCancel(ctx))
	if statusErr != nil {
		return
	}
	if now := validityOf(status); now != nil && (r.Old == nil || *now != *r.Old) {
		r.New = now
	}
	if status.Renewal != nil {
		r.NextAttempt = status.Renewal.NextAttempt
	}
	var pending *estenroll.PendingError
	if errors.As(err, &pending) {
		r.NextAttempt = pending.NotBefore.UTC()
	}
}
