package coap_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/internal/coap"
	"estenroll/internal/coap/coaptest"
)

// bindings are what both ends of a connection through a proxy bind to.
func bindings(t *testing.T, p *pki, faults coaptest.Faults) (client, server []byte) {
	t.Helper()
	handled := make(chan []byte, 1)
	addr := serve(t, p.serverConfig(), func(_ context.Context, req *coap.Request) *coap.Response {
		handled <- req.ChannelBinding
		return &coap.Response{Code: codes.Content}
	})
	conn := dial(t, coaptest.NewProxy(t, addr, faults).Addr(), p.clientConfig())
	client, err := conn.ChannelBinding()
	if err != nil {
		t.Error(err)
	}
	if _, err := conn.Do(t.Context(), &coap.Request{Method: codes.GET, Path: "/x"}); err != nil {
		t.Fatal(err)
	}
	return client, <-handled
}

// Both ends have one value, 12 bytes, of each session another, whichever datagram of
// the handshake is lost, doubled or late, or all of them now and then.
func TestChannelBinding(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	faults := map[string]coaptest.Faults{"none": {}}
	for name, action := range map[string]coaptest.Action{"lost": coaptest.Drop, "twice": coaptest.Twice, "late": coaptest.Late} {
		for n := 1; n <= 8; n++ {
			faults[fmt.Sprintf("datagram %d %s", n, name)] = coaptest.Faults{Hook: func(d coaptest.Datagram) coaptest.Action {
				if d.Number == n {
					return action
				}
				return coaptest.Pass
			}}
		}
	}
	for seed := range uint64(5) {
		faults[fmt.Sprintf("seed %d", seed)] = coaptest.Faults{Seed: seed, Loss: 0.1, Duplicate: 0.1, Reorder: 0.2}
	}
	seen := make(chan string, len(faults))
	t.Run("group", func(t *testing.T) {
		for name, faults := range faults {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				client, server := bindings(t, p, faults)
				if len(client) != 12 || !bytes.Equal(client, server) {
					t.Errorf("client %x, server %x", client, server)
				}
				seen <- string(client)
			})
		}
	})
	close(seen)
	values := map[string]bool{}
	for value := range seen {
		values[value] = true
	}
	if len(values) != len(faults) {
		t.Errorf("%d values of %d sessions", len(values), len(faults))
	}
}

// finishedMessage is a Finished in what OpenSSL prints with -msg.
var finishedMessage = regexp.MustCompile(`\[length 0018\][^\n]*\n\s+14 00 00 0c .. .. 00 00 00 00 00 0c((?: [0-9a-f]{2}){4})\s*\n\s+((?:[0-9a-f]{2} ?){8})`)

// firstFinished is the first Finished, which is the client's (RFC 5929 §3.1).
func firstFinished(output string) ([]byte, error) {
	found := finishedMessage.FindStringSubmatch(output)
	if found == nil {
		return nil, errors.New("no Finished in its output")
	}
	return hex.DecodeString(strings.ReplaceAll(found[1]+found[2], " ", ""))
}

// Our value is the Finished that OpenSSL's server has received, with every suite.
func TestChannelBindingOpenSSLServer(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	f := p.files(t)
	for _, args := range [][]string{
		{"-cipher", "ECDHE-ECDSA-AES128-CCM8"}, {"-cipher", "ECDHE-ECDSA-AES128-CCM"}, {"-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"},
		{"-mtu", "300"}, {"-listen"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			t.Parallel()
			server, addr := sServer(t, f, append(args, "-msg")...)
			got, err := dial(t, addr, p.clientConfig()).ChannelBinding()
			if err != nil {
				t.Fatal(err)
			}
			want := poll(t, server, func() ([]byte, error) { return firstFinished(server.output.String()) })
			if !bytes.Equal(got, want) {
				t.Errorf("got %x, want %x", got, want)
			}
		})
	}
}

// Our server's value is the Finished that OpenSSL's client has sent, in fragments too.
func TestChannelBindingOpenSSLClient(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	f := p.files(t)
	get, err := hex.DecodeString("48010001" + "0102030405060708" + "b178") // CON GET /x, a token of 8 bytes
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{nil, {"-mtu", "300"}} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			t.Parallel()
			handled := make(chan []byte, 1)
			addr := serve(t, p.serverConfig(), func(_ context.Context, req *coap.Request) *coap.Response {
				handled <- req.ChannelBinding
				return &coap.Response{Code: codes.Content}
			})
			client := exec.CommandContext(t.Context(), tool(t, "openssl"), append([]string{"s_client", "-dtls1_2", "-connect", addr, "-msg", "-quiet",
				"-cert", f.clientCert, "-key", f.clientKey, "-CAfile", f.ca, "-cipher", "ECDHE-ECDSA-AES128-CCM8"}, args...)...)
			output := new(lines)
			client.Stdout, client.Stderr = output, output
			input, err := client.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := client.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := input.Write(get); err != nil {
				t.Error(err)
			}
			var got []byte
			select {
			case got = <-handled:
			case <-time.After(20 * time.Second):
				t.Errorf("openssl s_client has not asked\n%s", output)
			}
			if err := input.Close(); err != nil {
				t.Error(err)
			}
			_ = client.Process.Kill() // -quiet does not end with its input
			_ = client.Wait()
			want, err := firstFinished(output.String())
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("got %x, want %x (%v)\n%s", got, want, err, output)
			}
		})
	}
}

// Whatever comes, what is taken down is bounded.
func FuzzHandshakeRecorder(f *testing.F) {
	f.Add([]byte{22, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 14, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 3, 3}, true)
	f.Add([]byte{22, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 13, 1, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 1, 7}, false)
	f.Add(bytes.Repeat([]byte{0xff}, 64), true)
	f.Fuzz(func(t *testing.T, datagram []byte, client bool) {
		if kept := coap.Recorded(datagram, client); kept > 128<<10 {
			t.Errorf("%d bytes are kept", kept)
		}
	})
}
