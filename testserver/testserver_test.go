package testserver_test

import (
	"crypto/x509/pkix"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll/testserver"
)

// taken is the address of a UDP port that somebody has.
func taken(t *testing.T) string {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn.LocalAddr().String()
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		cfg  testserver.Config
		want string
	}{
		{"any address", testserver.Config{Listen: ":0"}, "not a loopback address"},
		{"unspecified address", testserver.Config{Listen: "0.0.0.0:0"}, "not a loopback address"},
		{"address of a network", testserver.Config{Listen: "192.0.2.1:0"}, "not a loopback address"},
		{"name that may be anything", testserver.Config{Listen: "device.example:0"}, "not a loopback address"},
		{"no port", testserver.Config{Listen: "127.0.0.1"}, "missing port"},
		{"lifetime below a second", testserver.Config{Lifetime: time.Millisecond}, "whole seconds"},
		{"lifetime that would be cut", testserver.Config{Lifetime: 1500 * time.Millisecond}, "whole seconds"},
		{"negative backdate", testserver.Config{Backdate: -time.Second}, "whole seconds"},
		{"a password without a door for it", testserver.Config{HTTPUser: "dev"}, "no HTTPS door"},
		{"a link that a raw server does not know", testserver.Config{Raw: true, RequirePoP: true}, "does not know what links a CSR"},
		{"a pre-shared key that a raw server does not ask for", testserver.Config{Raw: true, PSKs: map[string][]byte{"dev": []byte("key")}}, "a raw server wants certificates"},
		{"a second door of a raw server", testserver.Config{Raw: true, ListenLinked: "127.0.0.1:0"}, "a raw server has one"},
		{"a second door for everybody", testserver.Config{ListenLinked: "0.0.0.0:0"}, "not a loopback address"},
		{"a port in use", testserver.Config{ListenLinked: taken(t)}, "address already in use"},
		{"a key to encrypt nothing for", testserver.Config{EnvelopeKeys: []testserver.EnvelopeKey{{ID: []byte{1}, Secret: make([]byte, 16)}}}, "the server makes no keys"},
		{"faults that contradict", testserver.Config{Faults: testserver.Faults{Expired: true, NotYetValid: true}}, "cannot be both"},
		{"too many other CAs", testserver.Config{OtherCAs: 33}, "not from 0 to 32"},
		{"a label that is an operation", testserver.Config{Labels: []string{"sen"}}, "that is no operation"},
		{"a label of two segments", testserver.Config{Labels: []string{"a/b"}}, "not a path segment"},
		{"an empty label", testserver.Config{Labels: []string{""}}, "not a path segment"},
		{"record that cannot be", testserver.Config{Record: "/nonexistent/record"}, "open record"},
		{"control that cannot be", testserver.Config{Control: "/nonexistent/control"}, "control socket"},
	} {
		t.Run(test.name, func(t *testing.T) {
			server, err := testserver.New(test.cfg)
			if err == nil {
				t.Fatalf("listens on %s: %v", server.URI(), server.Close())
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}

// A port that somebody else has is an error that names it, at each door.
func TestBusyPort(t *testing.T) {
	t.Parallel()
	other := startHTTPS(t, testserver.Config{})
	coaps, https := other.Addr().String(), strings.TrimPrefix(other.HTTPSURI(), "https://")
	for _, test := range []struct {
		address string
		cfg     testserver.Config
	}{
		{coaps, testserver.Config{Listen: coaps}},
		{coaps, testserver.Config{Listen: coaps, Raw: true}},
		{https, testserver.Config{ListenHTTPS: https}},
	} {
		if server, err := testserver.New(test.cfg); err == nil {
			t.Errorf("%+v: listens: %v", test.cfg, server.Close())
		} else if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), test.address) {
			t.Errorf("%+v: got %v", test.cfg, err)
		}
	}
}

func TestListen(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		cfg    testserver.Config
		prefix string
		names  []string
	}{
		{testserver.Config{}, "coaps://127.0.0.1:", []string{"localhost", "127.0.0.1", "::1"}},
		{testserver.Config{Listen: "127.0.0.2:0"}, "coaps://127.0.0.2:", []string{"127.0.0.1", "127.0.0.2"}},
		{testserver.Config{Listen: "localhost:0"}, "coaps://127.0.0.1:", nil},
		{testserver.Config{Names: []string{"ca.example", "192.0.2.7"}}, "coaps://127.0.0.1:", []string{"localhost", "ca.example", "192.0.2.7"}},
	} {
		server := start(t, test.cfg)
		if !strings.HasPrefix(server.URI(), test.prefix) || strings.HasSuffix(server.URI(), ":0") {
			t.Errorf("%s: got %s", test.cfg.Listen, server.URI())
		}
		for _, name := range test.names {
			if err := server.ServerChain()[0].VerifyHostname(name); err != nil {
				t.Errorf("%s: %v", test.cfg.Listen, err)
			}
		}
	}
}

func TestControl(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "control")
	server := start(t, testserver.Config{Control: path})
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", info, err)
	}
	control := testserver.Control{Path: path}

	got, err := control.SetFaults([]string{"wrong-key", "defer=2,max-age=1s"})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"defer=2,max-age=1s", "wrong-key"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if faults := server.Faults(); faults.Defer != 2 || !faults.WrongKey {
		t.Errorf("got %+v", faults)
	}
	if _, err := control.SetFaults([]string{"no-such"}); err == nil || !strings.Contains(err.Error(), "no such fault") {
		t.Errorf("unknown fault: got %v", err)
	}
	if got, err := control.Faults(); err != nil || !cmp.Equal(got, want) {
		t.Errorf("after a refused change: got %v, %v", got, err)
	}

	key := newKey(t)
	san := &pkix.Extension{Critical: true, Value: []byte{0x30, 0x03, 0x82, 0x01, 'y'}}
	for _, req := range []testserver.IDevIDRequest{
		{CSR: newCSR(t, key, named("dev")), SAN: san},
		{PublicKey: key.Public(), RawSubject: []byte{0x30, 0}, SAN: san},
	} {
		cert, err := control.IssueIDevID(req)
		if err != nil {
			t.Fatal(err)
		}
		if err := cert.CheckSignatureFrom(server.FactoryRoot()); err != nil {
			t.Error(err)
		}
		if !key.PublicKey.Equal(cert.PublicKey) || !cmp.Equal(cert.DNSNames, []string{"y"}) {
			t.Errorf("got %v for %v", cert.DNSNames, cert.Subject)
		}
	}
	if _, err := control.IssueIDevID(testserver.IDevIDRequest{}); err == nil {
		t.Error("an empty request was signed")
	}

	for _, line := range []string{"", "nonsense\n", `{"command":"stop"}` + "\n", strings.Repeat("x", 1<<17)} {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte(line)); err != nil && len(line) < 1<<16 {
			t.Error(err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := control.Faults(); err != nil {
		t.Errorf("after nonsense: %v", err)
	}
}

func TestControlSocketInUse(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "control")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	if server, err := testserver.New(testserver.Config{Control: path}); err == nil {
		t.Fatalf("took a socket in use: %v", server.Close())
	}
	if err := listener.Close(); err != nil { // and leaves the file, as a killed server does
		t.Fatal(err)
	}
	start(t, testserver.Config{Control: path})
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if server, err := testserver.New(testserver.Config{Control: file}); err == nil {
		t.Fatalf("took the place of a file: %v", server.Close())
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "precious" {
		t.Errorf("file: %q, %v", data, err)
	}
}

// Not parallel: it counts goroutines.
func TestCloseLeavesNothing(t *testing.T) {
	before := runtime.NumGoroutine()
	for range 3 {
		path := filepath.Join(t.TempDir(), "control")
		server, err := testserver.New(testserver.Config{Control: path, Faults: testserver.Faults{Delay: time.Hour}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (testserver.Control{Path: path}).Faults(); err != nil {
			t.Fatal(err)
		}
		// Clients that say nothing any more, on both doors, and a request under way.
		silent, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		device := idevid(t, server, "dev")
		client := mustDial(t, server, device)
		enrolled := make(chan error)
		go func() {
			_, err := client.SimpleEnroll(t.Context(), newCSR(t, device.key, named("dev")))
			enrolled <- err
		}()
		for range 2 { // it is idempotent
			if err := server.Close(); err != nil {
				t.Fatal(err)
			}
		}
		<-server.Done()
		if err := <-enrolled; err == nil {
			t.Error("an enrolment of an hour is done")
		}
		if err := errors.Join(silent.Close(), client.Session.Close()); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("control socket: %v", err)
		}
	}
	waitForGoroutines(t, before)
}

// waitForGoroutines fails the test with their stacks if there are more.
func waitForGoroutines(t *testing.T, want int) {
	t.Helper()
	deadline := time.After(5 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for runtime.NumGoroutine() > want {
		select {
		case <-tick.C:
		case <-deadline:
			stacks := make([]byte, 1<<16)
			t.Fatalf("%d goroutines, want %d:\n%s", runtime.NumGoroutine(), want, stacks[:runtime.Stack(stacks, true)])
		}
	}
}
