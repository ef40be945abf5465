package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"estenroll/engine/enginetest/p11crash"
	"estenroll/internal/coap/coaptest"
)

// crashKind is a sequence of points at which the program is killed: each run is of
// the unmodified program, which appends the points that it passes to the log, and
// is killed at one of them if that is given.
type crashKind struct {
	name string
	run  func(t *testing.T, d *crashDevice, log string, at p11crash.Point, args ...string) (string, error)
}

var (
	crashCalls     = crashKind{"PKCS#11 calls", killedAtCall}
	crashDatagrams = crashKind{"datagrams", killedAtDatagram}
	crashFiles     = crashKind{"operations on files of the state directory", killedInDirectory("state")}
	// Inside a module's own writes nothing is promised (DESIGN.md §7.2).
	crashModule = crashKind{"the module's own writes", killedInDirectory("tokens")}
)

// promised are the kinds of which every point is survived.
var promised = []crashKind{crashCalls, crashDatagrams, crashFiles}

func killedAtCall(t *testing.T, d *crashDevice, log string, at p11crash.Point, args ...string) (string, error) {
	return combined(d.command(t, d.matrix.module.Path, d.matrix.module.Env(d.matrix.token.ModulePath, log, at), args...))
}

func killedInDirectory(name string) func(*testing.T, *crashDevice, string, p11crash.Point, ...string) (string, error) {
	return func(t *testing.T, d *crashDevice, log string, at p11crash.Point, args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		plain := d.command(t, d.matrix.token.ModulePath, nil, args...)
		cmd := d.matrix.supervisor.Command(ctx, log, at, filepath.Join(d.dir, name), plain.Path, plain.Args[1:]...)
		cmd.Env = plain.Env
		return combined(cmd)
	}
}

func combined(cmd *exec.Cmd) (string, error) {
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// killedAtDatagram has a proxy count what the program sends and what it is sent, and
// kill it before or after it has sent one on. What is on its way then goes nowhere.
//
// Two things are no points. The server's answer to a close, an alert, arrives at a socket
// that the program has closed. And what a timer sends again is sent on, but not counted, or
// a slow machine would make a sequence of its own: the timers of CoAP are made longer
// than a run, those of the handshake cannot be, so its messages are looked at.
func killedAtDatagram(t *testing.T, d *crashDevice, log string, at p11crash.Point, args ...string) (string, error) {
	file, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	k := &datagramKiller{t: t, log: file, at: at, seen: map[string]bool{}, started: make(chan struct{})}
	proxy := coaptest.NewProxy(t, strings.TrimPrefix(d.matrix.server.uri, "coaps://"), coaptest.Faults{Hook: k.before, Sent: k.after})
	d.proxy = proxy // for the next run too: a pending request is its server's
	k.cmd = d.command(t, d.matrix.token.ModulePath, []string{"EST_ENROLL_ACK_TIMEOUT=60s", "EST_ENROLL_EXCHANGE_TIMEOUT=5m"}, args...)
	var out bytes.Buffer
	k.cmd.Stdout, k.cmd.Stderr = &out, &out
	if err := k.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	close(k.started)
	err = k.cmd.Wait()
	k.over.Store(true)
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	return out.String(), err
}

// datagramKiller is asked by the proxy, one datagram at a time.
type datagramKiller struct {
	t       *testing.T
	cmd     *exec.Cmd
	started chan struct{}
	log     *os.File
	at      p11crash.Point
	current p11crash.Point
	counted bool // the one under way
	seen    map[string]bool
	dead    bool
	over    atomic.Bool // the program is, and what comes is the next run's
}

func (k *datagramKiller) before(datagram coaptest.Datagram) coaptest.Action {
	k.counted = false
	switch {
	case k.over.Load():
		return coaptest.Pass
	case k.dead:
		return coaptest.Drop
	}
	if isCloseAnswer(datagram) || k.sentAgain(datagram) {
		return coaptest.Pass
	}
	k.counted = true
	k.current.Number++
	k.current.Function = strings.ReplaceAll(datagram.Direction.String(), " ", "-")
	if k.point(p11crash.Before) {
		return coaptest.Drop
	}
	return coaptest.Pass
}

func (k *datagramKiller) after(coaptest.Datagram) {
	if k.counted && !k.dead {
		k.point(p11crash.After)
	}
}

// point records one, and kills the program if it is the one.
func (k *datagramKiller) point(when p11crash.When) bool {
	k.current.When = when
	if _, err := fmt.Fprintln(k.log, k.current); err != nil {
		k.t.Error(err)
	}
	if k.current == k.at {
		k.dead = true
		<-k.started
		if err := k.cmd.Process.Kill(); err != nil {
			k.t.Logf("kill: %v", err) // Hit judges
		}
	}
	return k.dead
}

func isCloseAnswer(datagram coaptest.Datagram) bool {
	r := record(datagram.Payload)
	return datagram.Direction == coaptest.ToClient && len(r) >= recordHeader && r[0] == alertRecord && r.epoch() != 0
}

// sentAgain reports a datagram of the handshake that begins as one of this client's
// has begun before (RFC 6347 §4.2.4): with the same message in the clear, where only
// the number of the record is another, with the ChangeCipherSpec, or with the Finished.
func (k *datagramKiller) sentAgain(datagram coaptest.Datagram) bool {
	r := record(datagram.Payload)
	if len(r) < recordHeader || r[0] != handshakeRecord && r[0] != changeCipherSpec {
		return false
	}
	beginning := fmt.Sprintf("%d %d %d %d", datagram.Client, datagram.Direction, r[0], r.epoch())
	if r[0] == handshakeRecord && r.epoch() == 0 {
		beginning += fmt.Sprintf(" %x", r[recordHeader:min(recordHeader+handshakeHeader, len(r))])
	}
	again := k.seen[beginning]
	k.seen[beginning] = true
	return again
}
