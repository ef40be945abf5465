package testserver_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/est"
	"estenroll/testserver"
)

func TestRecord(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "record.jsonl")
	earlier := []byte(`{"kind":"issuance","serial":"1"}` + "\n")
	if err := os.WriteFile(path, earlier, 0o600); err != nil {
		t.Fatal(err)
	}
	server := start(t, testserver.Config{Record: path})
	device := idevid(t, server, "dev")
	csr := newCSR(t, device.key, named("dev"))
	cert := enroll(t, server, "sen", device, csr)
	enroll(t, server, "sen", device, csr)

	events := server.Events()
	if len(events) != 3 {
		t.Fatalf("got %d events, want 3", len(events))
	}
	want := testserver.Event{
		Time:          events[1].Time,
		Kind:          testserver.EventIssuance,
		Operation:     est.SimpleEnroll,
		Path:          "/.well-known/est/sen",
		Client:        hexDigest(device.cert.Raw),
		ClientSubject: "CN=dev",
		CSR:           hexDigest(csr),
		PublicKey:     hexDigest(cert.RawSubjectPublicKeyInfo),
		Serial:        cert.SerialNumber.Text(16),
		Subject:       "CN=dev",
		Certificate:   hexDigest(cert.Raw),
	}
	if diff := cmp.Diff(want, events[1]); diff != "" {
		t.Errorf("issuance (-want +got):\n%s", diff)
	}
	want.Kind, want.Time = testserver.EventReplay, events[2].Time
	if diff := cmp.Diff(want, events[2]); diff != "" {
		t.Errorf("replay (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(events[1:2], server.Issuances()); diff != "" {
		t.Errorf("issuances (-want +got):\n%s", diff)
	}

	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines, found := bytes.CutPrefix(data, earlier)
	if !found {
		t.Fatal("what the file held before is gone")
	}
	var written []testserver.Event
	for line := range bytes.Lines(lines) {
		var event testserver.Event
		if err := json.Unmarshal(line, &event); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		written = append(written, event)
	}
	if diff := cmp.Diff(events, written); diff != "" {
		t.Errorf("file (-want +got):\n%s", diff)
	}
}

func TestUnrecordedCertificateDoesNotLeave(t *testing.T) {
	t.Parallel()
	other := start(t, testserver.Config{})
	device := idevid(t, other, "dev")
	server := start(t, testserver.Config{Record: "/dev/full"}) // every write: no space left on device
	resp := ask(t, server, post("sen", device, newCSR(t, device.key, named("dev"))))
	if resp.Code != codes.InternalServerError {
		t.Errorf("got %v, want 5.00", resp.Code)
	}
	if cert, err := server.IssueIDevID(testserver.IDevIDRequest{CSR: newCSR(t, device.key, named("dev"))}); err == nil || cert != nil {
		t.Errorf("IDevID: got %v, %v, want an error", cert, err)
	}
	if got := server.Events(); len(got) != 0 {
		t.Errorf("events: %v", got)
	}
}
