package main

import (
	"fmt"
	"strings"
	"testing"

	"estenroll"
	"estenroll/est"
)

// What a person is told to do about each code of an answer (RFC 9148 §4.5), and what a
// machine about the exit code: to come back, or not to.
func TestJudgementOfCodes(t *testing.T) {
	for _, c := range []struct {
		status est.StatusError
		code   int
		hint   string
	}{
		{est.StatusError{Code: "4.00 BadRequest", Class: 4}, exitRefused, "ask the people of the EST server"},
		{est.StatusError{Code: "4.01 Unauthorized", Class: 4, Unauthorized: true}, exitRefused, "does not accept the certificate of this device"},
		{est.StatusError{Code: "4.03 Forbidden", Class: 4}, exitRefused, "ask the people of the EST server"},
		{est.StatusError{Code: "4.04 NotFound", Class: 4, NotFound: true}, exitRefused, "ask the people of the EST server"},
		{est.StatusError{Operation: est.CACerts, Code: "4.04 NotFound", Class: 4, NotFound: true}, exitRefused, "EST is not at that path: check label and the path in server; --discovery on"},
		{est.StatusError{Code: "4.05 MethodNotAllowed", Class: 4}, exitRefused, "ask the people of the EST server"},
		{est.StatusError{Code: "4.06 NotAcceptable", Class: 4}, exitRefused, "ask the people of the EST server"},
		{est.StatusError{Code: "4.13 RequestEntityTooLarge", Class: 4}, exitRefused, "ask the people of the EST server"},
		{est.StatusError{Code: "4.15 UnsupportedMediaType", Class: 4}, exitRefused, "ask the people of the EST server"},
		{est.StatusError{Code: "5.00 InternalServerError", Class: 5}, exitTryLater, "the server has a problem of its own"},
		{est.StatusError{Code: "5.01 NotImplemented", Class: 5}, exitTryLater, "the server has a problem of its own"},
		{est.StatusError{Code: "5.04 GatewayTimeout", Class: 5}, exitTryLater, "the server has a problem of its own"},
	} {
		err := fmt.Errorf("renew: %w", &estenroll.StepError{Step: estenroll.StepRequest, Err: &c.status})
		if got := judge(err, false); got.code != c.code || !strings.Contains(got.hint, c.hint) {
			t.Errorf("%s %s: got %d and %q", c.status.Operation, c.status.Code, got.code, got.hint)
		}
	}
	pending := fmt.Errorf("renew: %w", &estenroll.PendingError{})
	if got := judge(pending, false); got.code != exitPending {
		t.Errorf("5.03 and 4.29: got %d", got.code)
	}
}
