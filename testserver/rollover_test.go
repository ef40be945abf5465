package testserver_test

import (
	"crypto/x509"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"estenroll/est"
	"estenroll/testserver"
)

// verifies has OpenSSL judge a certificate by a root and what lies between.
func verifies(t *testing.T, root, cert *x509.Certificate, between ...*x509.Certificate) bool {
	t.Helper()
	dir := t.TempDir()
	var untrusted []byte
	for _, c := range between {
		untrusted = append(untrusted, pemOf(c)...)
	}
	writeFile(t, filepath.Join(dir, "root.pem"), pemOf(root))
	writeFile(t, filepath.Join(dir, "between.pem"), untrusted)
	writeFile(t, filepath.Join(dir, "cert.pem"), pemOf(cert))
	args := []string{"verify", "-x509_strict", "-CAfile", "root.pem"}
	if len(between) > 0 {
		args = append(args, "-untrusted", "between.pem")
	}
	cmd := exec.CommandContext(t.Context(), "openssl", append(args, "cert.pem")...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	t.Logf("%s", out)
	return err == nil
}

// A client enrols under each root in turn; OpenSSL follows the links both ways.
func TestRollover(t *testing.T) {
	t.Parallel()
	for _, single := range []bool{false, true} {
		server := start(t, testserver.Config{SingleCA: single, OtherCAs: 1})
		device := idevid(t, server, "dev")
		enrolled := func() credential {
			t.Helper()
			key := newKey(t)
			answer, err := mustDial(t, server, device).SimpleEnroll(t.Context(), newCSR(t, key, named("dev")))
			if err != nil {
				t.Fatal(err)
			}
			return credential{answer[0], key}
		}
		published := func() []*x509.Certificate {
			t.Helper()
			certs, err := mustDial(t, server, device).CACerts(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return certs
		}
		old, oldChain := enrolled(), server.ServerChain()
		made, err := server.Rollover(testserver.Rollover{Phase: testserver.RolloverAnnounced})
		if err != nil {
			t.Fatal(err)
		}
		for name, judged := range map[string]bool{
			"NewWithOld under the old root":  verifies(t, made.OldWithOld, made.NewWithOld),
			"OldWithNew under the new root":  verifies(t, made.NewWithNew, made.OldWithNew),
			"the new root by way of the old": verifies(t, made.OldWithOld, server.ServerChain()[0], append(oldChain[1:], made.OldWithNew)...),
		} {
			if !judged {
				t.Errorf("OpenSSL does not accept %s", name)
			}
		}
		if verifies(t, made.OldWithOld, made.NewWithNew) || verifies(t, made.NewWithNew, made.OldWithOld) {
			t.Error("OpenSSL accepts a root without a link")
		}
		has := func(phase string, root, chain int, links ...*x509.Certificate) {
			t.Helper()
			certs := published()
			for _, link := range []*x509.Certificate{made.OldWithNew, made.NewWithOld} {
				if slices.ContainsFunc(certs, link.Equal) != slices.ContainsFunc(links, link.Equal) {
					t.Errorf("%s: crts has or has not %s under %s", phase, link.Subject, link.Issuer)
				}
			}
			if got, want := len(certs), 2+root+chain+len(links); got != want {
				t.Errorf("%s: %d certificates, want %d", phase, got, want)
			}
		}
		chain := func(n int) int {
			if single {
				return 0
			}
			return n
		}
		has("announced", 2, chain(2), made.OldWithNew, made.NewWithOld)
		if !server.Root().Equal(made.OldWithOld) || !server.ServerChain()[0].Equal(oldChain[0]) {
			t.Error("announced: another root issues")
		}

		if _, err := server.Rollover(testserver.Rollover{Phase: testserver.RolloverSwitched}); err != nil {
			t.Fatal(err)
		}
		has("switched", 2, chain(2), made.OldWithNew, made.NewWithOld)
		fresh := enrolled() // dial trusts server.Root alone
		if !server.Root().Equal(made.NewWithNew) {
			t.Error("switched: the old root issues")
		}
		if !verifies(t, made.OldWithOld, fresh.cert, append(server.ServerChain()[1:], made.NewWithOld)...) ||
			!verifies(t, made.NewWithNew, old.cert, append(oldChain[1:], made.OldWithNew)...) ||
			!verifies(t, made.OldWithOld, server.ServerChain()[0], append(server.ServerChain()[1:], made.NewWithOld)...) {
			t.Error("OpenSSL does not follow the links to the certificates of the other root")
		}
		// The old certificate is renewed, by the new root.
		renewed, err := mustDial(t, server, old).SimpleReenroll(t.Context(), newCSR(t, old.key, named("dev")))
		if err != nil {
			t.Fatal(err)
		}
		if renewed[0].CheckSignatureFrom(server.Issuing()) != nil {
			t.Error("switched: renewed by the old CA")
		}

		if _, err := server.Rollover(testserver.Rollover{Phase: testserver.RolloverFinished}); err != nil {
			t.Fatal(err)
		}
		has("finished", 1, chain(1), made.NewWithOld)
		if _, err := dial(t, server, old, time.Now); !errors.Is(err, est.ErrCredentialRefused) {
			t.Errorf("finished: a client of the old root: %v", err)
		}
		if _, err := mustDial(t, server, fresh).SimpleReenroll(t.Context(), newCSR(t, fresh.key, named("dev"))); err != nil {
			t.Error(err)
		}

		// The next one passes over the announcement, and a client finds the way by
		// both links; then by none.
		second, err := server.Rollover(testserver.Rollover{Phase: testserver.RolloverFinished})
		if err != nil {
			t.Fatal(err)
		}
		has("finished twice", 1, chain(1)+1, made.NewWithOld)
		if last := enrolled(); !verifies(t, made.OldWithOld, last.cert, append(server.ServerChain()[1:], made.NewWithOld, second.NewWithOld)...) {
			t.Error("OpenSSL does not follow two links")
		}
		if _, err := server.Rollover(testserver.Rollover{Phase: testserver.RolloverFinished, NoLinks: true}); err != nil {
			t.Fatal(err)
		}
		has("finished without links", 1, chain(1))
	}
}

// The socket's rollover is the server's, and it goes one way.
func TestControlRollover(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "control")
	server := start(t, testserver.Config{Control: path, Raw: true})
	control := testserver.Control{Path: path}
	old := server.Root()
	made, err := control.Rollover(testserver.Rollover{Phase: testserver.RolloverSwitched, NoLinks: true})
	if err != nil {
		t.Fatal(err)
	}
	if !made.OldWithOld.Equal(old) || !made.NewWithNew.Equal(server.Root()) || made.NewWithOld.CheckSignatureFrom(old) != nil || made.OldWithNew.CheckSignatureFrom(made.NewWithNew) != nil {
		t.Errorf("got %+v", made)
	}
	certs, err := mustDial(t, server, idevid(t, server, "dev")).CACerts(t.Context()) // the raw door's certificate follows too
	if err != nil {
		t.Fatal(err)
	}
	if len(certs) != 4 {
		t.Errorf("without links crts has %d certificates, want 4", len(certs))
	}
	for phase, want := range map[testserver.RolloverPhase]string{testserver.RolloverAnnounced: "it is switched already", "begun": "is none of", "": "is none of"} {
		if _, err := control.Rollover(testserver.Rollover{Phase: phase}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", phase, err, want)
		}
	}
}
