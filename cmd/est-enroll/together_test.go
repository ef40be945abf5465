package main

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"estenroll/engine/enginetest/softhsm"
	"estenroll/testserver"
)

// TestTogether starts eight processes of the program, as it ships, at the same instant
// on one state directory: for a first boot, and when the renewal is due. One does it,
// and seven find that nothing is to do, by the server's record and in the eyes of
// pkcs11-tool.
func TestTogether(t *testing.T) {
	t.Parallel()
	var ago atomic.Int64 // how far the server's clock is behind
	ago.Store(int64(30 * 24 * time.Hour))
	m := agedMatrix(t, func() time.Time { return time.Now().Add(-time.Duration(ago.Load())) })
	d := m.device(t, "together")

	enrolled := 0
	for _, out := range d.together(t, nil, "enroll") {
		switch {
		case strings.HasPrefix(out, "enrolled: "):
			enrolled++
		case !strings.HasPrefix(out, "nothing to do: "):
			t.Errorf("enroll: %q", out)
		}
	}
	issued := m.issuances(t)
	if enrolled != 1 || len(issued) != 1 {
		t.Errorf("eight first boots: %d enrolled, the server issued %d certificates", enrolled, len(issued))
	}
	wrong := new(findings)
	if d.judge(t, crashStory{leaves: 1, keys: 1}, issued, wrong); len(wrong.text) > 0 {
		t.Errorf("eight first boots:\n%s", strings.Join(wrong.text, "\n"))
	}

	// Of its 90 days 60 are left: with that margin it is due from the next second on,
	// and one of today is not for 30 days.
	ago.Store(0)
	due := d.dueNextSecond(t)
	renewed := 0
	for _, out := range d.together(t, due, "renew") {
		switch {
		case strings.HasPrefix(out, "renewed: "):
			renewed++
		case out != "":
			t.Errorf("renew: %q", out)
		}
	}
	if issued = m.issuances(t); renewed != 1 || len(issued) != 2 {
		t.Errorf("eight renewals: %d renewed, the server issued %d certificates in all", renewed, len(issued))
	}
	if d.judge(t, crashStory{leaves: 2, keys: 1}, issued, wrong); len(wrong.text) > 0 {
		t.Errorf("eight renewals:\n%s", strings.Join(wrong.text, "\n"))
	}
}

// agedMatrix is newMatrix with a server in this process, which has a clock of its own.
func agedMatrix(t *testing.T, now func() time.Time) *matrix {
	t.Helper()
	m := &matrix{bin: builtPrograms(t), token: softhsm.New(t, softhsm.WithPIN(markerPIN)), server: &session{bin: builtPrograms(t), work: t.TempDir()}}
	dir := filepath.Join(m.server.work, "ca")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	server, err := testserver.New(testserver.Config{
		Now: now, Record: filepath.Join(dir, "record.jsonl"), Control: filepath.Join(dir, "control"),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	m.server.uri = server.URI()
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Root().Raw})
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), root, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := m.token.StoreIDevID(m.server.signIDevID); err != nil {
		t.Fatal(err)
	}
	m.fromFactory(t)
	return m
}

// together starts the program eight times at once and returns what each says on
// standard output. Each ends well, and warns of nothing.
func (d *crashDevice) together(t *testing.T, env []string, args ...string) [8]string {
	t.Helper()
	var said [8]string
	var all sync.WaitGroup
	start := make(chan struct{})
	for i := range said {
		all.Go(func() {
			cmd := d.command(t, d.matrix.token.ModulePath, env, args...)
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			<-start
			if err := cmd.Run(); err != nil || stderr.Len() > 0 {
				t.Errorf("%s: %v\n%s", args, err, &stderr)
			}
			said[i] = stdout.String()
		})
	}
	close(start)
	all.Wait()
	return said
}

// dueNextSecond returns an environment in which the certificate is due from the next
// second on, and has waited for that.
func (d *crashDevice) dueNextSecond(t *testing.T) []string {
	t.Helper()
	out, err := d.command(t, d.matrix.token.ModulePath, nil, "status", "--json").Output()
	var status struct {
		Current struct {
			NotAfter time.Time `json:"not_after"`
		}
	}
	if err = errors.Join(err, json.Unmarshal(out, &status)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	margin := status.Current.NotAfter.Sub(time.Now().Truncate(time.Second).Add(time.Second))
	env := []string{"EST_ENROLL_NOMINAL_USAGE=1/10000", "EST_ENROLL_NO_JITTER=true", "EST_ENROLL_MAX_MARGIN=" + margin.String()}
	if err := eventually(func() error {
		out, err := d.command(t, d.matrix.token.ModulePath, env, "status").Output()
		if err == nil && !bytes.Contains(out, []byte("at the next run (due)")) {
			err = fmt.Errorf("it is not due:\n%s", out)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return env
}
