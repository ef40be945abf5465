package coaptest_test

import (
	"net"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"estenroll/internal/coap/coaptest"
)

// pair is a client's socket connected to a proxy, and the server's socket.
func pair(t *testing.T, faults coaptest.Faults) (client net.Conn, server net.PacketConn, proxy *coaptest.Proxy) {
	t.Helper()
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	proxy = coaptest.NewProxy(t, server.LocalAddr().String(), faults)
	if client, err = net.Dial("udp", proxy.Addr()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	return client, server, proxy
}

// carry sends one byte for each i below n and returns what arrives until the
// last, n, which always passes.
func carry(t *testing.T, n byte, faults coaptest.Faults) ([]byte, coaptest.Counters) {
	t.Helper()
	inner := faults.Hook
	faults.Hook = func(d coaptest.Datagram) coaptest.Action {
		if d.Payload[0] == n {
			return coaptest.Pass
		}
		if inner != nil {
			return inner(d)
		}
		return coaptest.Draw
	}
	client, server, proxy := pair(t, faults)
	for i := range n + 1 {
		if _, err := client.Write([]byte{i}); err != nil {
			t.Fatal(err)
		}
	}
	if err := server.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var arrived []byte
	buf := make([]byte, 2)
	for {
		if _, _, err := server.ReadFrom(buf); err != nil {
			t.Fatal(err)
		}
		if buf[0] == n {
			return arrived, proxy.Counters()
		}
		arrived = append(arrived, buf[0])
	}
}

func TestActions(t *testing.T) {
	t.Parallel()
	got, counters := carry(t, 7, coaptest.Faults{Hook: func(d coaptest.Datagram) coaptest.Action {
		if d.Number != int(d.Payload[0])+1 || d.Direction != coaptest.ToServer || d.Client != 0 {
			t.Errorf("the hook got %+v", d)
		}
		switch d.Number {
		case 2:
			return coaptest.Drop
		case 3:
			return coaptest.Twice
		case 5:
			return coaptest.Late
		}
		return coaptest.Draw
	}})
	if diff := cmp.Diff([]byte{0, 2, 2, 3, 5, 4, 6}, got); diff != "" {
		t.Errorf("order (-want +got):\n%s", diff)
	}
	want := coaptest.Counters{ToServer: coaptest.Count{Datagrams: 8, Bytes: 8}, Lost: 1, Duplicated: 1, Delayed: 1}
	if diff := cmp.Diff(want, counters); diff != "" {
		t.Errorf("counters (-want +got):\n%s", diff)
	}
}

// A datagram that nothing overtakes arrives all the same.
func TestLateAlone(t *testing.T) {
	t.Parallel()
	client, server, _ := pair(t, coaptest.Faults{Reorder: 1})
	if _, err := client.Write([]byte("late")); err != nil {
		t.Fatal(err)
	}
	if err := server.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 8)
	if n, _, err := server.ReadFrom(buf); err != nil || string(buf[:n]) != "late" {
		t.Fatalf("got %q, %v", buf[:n], err)
	}
}

// The same seed has the same effect, another has not.
func TestSeed(t *testing.T) {
	t.Parallel()
	faults := coaptest.Faults{Seed: 1, Loss: 0.2, Duplicate: 0.2}
	first, counters := carry(t, 200, faults)
	if counters.Lost < 20 || counters.Lost > 60 || counters.Duplicated < 15 || counters.Duplicated > 50 {
		t.Errorf("20 %% of 200 datagrams: %+v", counters)
	}
	again, _ := carry(t, 200, faults)
	if diff := cmp.Diff(first, again); diff != "" {
		t.Errorf("seed 1 again (-first +again):\n%s", diff)
	}
	faults.Seed = 2
	if other, _ := carry(t, 200, faults); cmp.Equal(first, other) {
		t.Error("seed 2 does what seed 1 did")
	}
}

// Each client is answered on its own port, in the other direction too.
func TestClients(t *testing.T) {
	t.Parallel()
	one, server, proxy := pair(t, coaptest.Faults{})
	two, err := net.Dial("udp", proxy.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = two.Close() }()
	buf := make([]byte, 8)
	for name, client := range map[string]net.Conn{"one": one, "two": two} {
		if _, err := client.Write([]byte(name)); err != nil {
			t.Fatal(err)
		}
		n, from, err := server.ReadFrom(buf)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := server.WriteTo(buf[:n], from); err != nil {
			t.Fatal(err)
		}
		if n, err := client.Read(buf); err != nil || string(buf[:n]) != name {
			t.Errorf("client %s got %q, %v", name, buf[:n], err)
		}
	}
	want := coaptest.Counters{ToServer: coaptest.Count{Datagrams: 2, Bytes: 6}, ToClient: coaptest.Count{Datagrams: 2, Bytes: 6}}
	if diff := cmp.Diff(want, proxy.Counters()); diff != "" {
		t.Errorf("counters (-want +got):\n%s", diff)
	}
}

// What Tamper returns takes the place of the datagram.
func TestTamper(t *testing.T) {
	t.Parallel()
	got, counters := carry(t, 4, coaptest.Faults{Tamper: func(d coaptest.Datagram) ([][]byte, bool) {
		switch d.Payload[0] {
		case 1:
			return nil, true
		case 2:
			return [][]byte{{20}, {21}}, true
		}
		return [][]byte{{99}}, false
	}})
	if diff := cmp.Diff([]byte{0, 20, 21, 3}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if counters.Tampered != 2 {
		t.Errorf("counters: %+v", counters)
	}
}
