package main

import (
	"encoding/json"
	"encoding/pem"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"estenroll/engine/enginetest/p11crash"
	"estenroll/testserver/globalsigntest"
)

// estclientRuns make the requests of an enrolment by est-enroll, each in a run of its
// own, as estclient of globalsign/est v1.0.6 does: at the same server, with the same
// token. The key is the IDevID's, for estclient makes none, and what it gets goes
// into files.
var estclientRuns = []struct {
	name string // of the lap
	args []string
}{
	{"cacerts", []string{"cacerts", "-out", "cacerts.pem"}},
	{"csrattrs", []string{"csrattrs"}},
	{"enroll", []string{"enroll", "-cn", "device", "-out", "issued.pem"}}, // it builds the CSR too
	{"proof: cacerts", []string{"cacerts", "-certs", "issued.pem", "-out", "again.pem"}},
}

// prepareEstclient builds estclient and writes the file that it has the IDevID in.
func (b *bench) prepareEstclient(t *testing.T) {
	t.Helper()
	var err error
	if b.estclient, err = globalsignProgram(globalsigntest.Client); err != nil {
		t.Fatal(err)
	}
	leaf := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte(read(t, filepath.Join(b.matrix.server.work, "idevid.der")))})
	b.idevid = filepath.Join(t.TempDir(), "idevid.pem")
	if err := os.WriteFile(b.idevid, append(leaf, read(t, b.factory)...), 0o600); err != nil {
		t.Fatal(err)
	}
}

// runEstclient enrols a device, and times each run.
func (b *bench) runEstclient(t *testing.T, d *crashDevice, module, server string, env []string) (laps []lap) {
	t.Helper()
	type object map[string]any
	config, err := json.Marshal(object{
		"server": strings.TrimPrefix(server, "https://"), "explicit_anchor": b.anchorsFile(), "client_certificates": b.idevid,
		"private_key": object{"hsm": object{"pkcs11_library_path": module, "token_label": b.matrix.token.Label, "token_pin": b.matrix.token.PIN, "key_id": 1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(d.dir, "estclient.json")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, run := range estclientRuns {
		args := []string{b.estclient, run.args[0], "-config", file}
		for _, arg := range run.args[1:] {
			if strings.HasSuffix(arg, ".pem") {
				arg = filepath.Join(d.dir, arg)
			}
			args = append(args, arg)
		}
		began := time.Now()
		b.program(t, d, io.Discard, env, args...)
		laps = append(laps, lap{Name: run.name, Milliseconds: milliseconds(time.Since(began))})
	}
	if issued := b.certificates(t, filepath.Join(d.dir, "issued.pem")); len(issued) != 1 || issued[0].Subject.CommonName != "device" {
		t.Fatalf("estclient got %d certificates, of which the first is for %s", len(issued), issued[0].Subject)
	}
	return laps
}

func (b *bench) timeEstclient(t *testing.T) []lap {
	t.Helper()
	return b.runEstclient(t, b.device(t), b.matrix.token.ModulePath, b.https, nil)
}

// countHTTPS counts what both programs make the HSM and the network do.
func (b *bench) countHTTPS(t *testing.T, f *figures) {
	t.Helper()
	for work, run := range map[*tlsWork]func(d *crashDevice, server string, env []string){
		&f.HTTPSWork: func(d *crashDevice, server string, env []string) {
			b.program(t, d, io.Discard, env, append([]string{b.binary()}, b.arguments(d, b.matrix.module.Path, server)...)...)
		},
		&f.EstclientWork: func(d *crashDevice, server string, env []string) {
			b.runEstclient(t, d, b.matrix.module.Path, server, env)
		},
	} {
		relay := newRelay(t, b.https)
		d := b.device(t)
		log := filepath.Join(d.dir, "calls")
		run(d, relay.uri(), b.matrix.module.Env(b.matrix.token.ModulePath, log, p11crash.Point{}))
		work.Connections, work.Bytes = relay.close(t)
		for _, point := range p11crash.ReadLog(t, log) {
			if point.Function == "C_SignInit" && point.When == p11crash.Before {
				work.Signatures++
			}
		}
	}
}
