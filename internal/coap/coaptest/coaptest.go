// Package coaptest is a UDP proxy that loses, doubles, reorders and changes
// datagrams: the network that tests put between a CoAP client and its server. It
// knows nothing of what it carries. It is a test tool and ships in no program.
package coaptest

import (
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// Direction is the way a datagram goes.
type Direction int

const (
	ToServer Direction = iota
	ToClient
)

func (d Direction) String() string {
	if d == ToServer {
		return "to server"
	}
	return "to client"
}

// Datagram is what a Hook sees. Number counts all datagrams that reached the
// proxy, from 1, in the order of their arrival; Client counts the clients from
// 0. The payload must not be changed.
type Datagram struct {
	Direction Direction
	Number    int
	Client    int
	Payload   []byte
}

// Action is what becomes of a datagram.
type Action int

const (
	Draw  Action = iota // by the odds of Faults
	Pass                // once, at once
	Drop                // not at all
	Twice               // two copies, at once
	Late                // after the next one of its direction, or after LateDelay
)

// LateDelay is how long a datagram is held if nothing overtakes it.
const LateDelay = 20 * time.Millisecond

// Faults are the odds, each from 0 to 1, of what happens to a datagram. The
// draws of each client and direction are a sequence of their own that follows
// from Seed, so that the pace of one does not change the other's.
type Faults struct {
	Seed                     uint64
	Loss, Duplicate, Reorder float64
	// Hook is asked first, one call at a time, and may leave it to the odds.
	Hook func(Datagram) Action
	// Tamper is asked before Hook, one call at a time: what it returns goes on at
	// once, in the datagram's place, unless it says that it leaves it alone.
	Tamper func(Datagram) (instead [][]byte, tampered bool)
	// Sent is called after a datagram has been sent on at once, before the next is.
	Sent func(Datagram)
}

// Count is what one side sent, before faults.
type Count struct{ Datagrams, Bytes int }

// Counters are what a proxy has seen and done.
type Counters struct {
	ToServer, ToClient        Count
	Lost, Duplicated, Delayed int
	Tampered                  int
}

// Proxy is a proxy on a loopback port. It ends with its test.
type Proxy struct {
	faults Faults
	target netip.AddrPort
	front  *net.UDPConn
	tasks  sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	flows    map[netip.AddrPort]*flow
	counters Counters
}

// flow is one client's two paths.
type flow struct {
	client int
	addr   netip.AddrPort
	back   *net.UDPConn
	paths  [2]path
}

// path is one direction of a flow.
type path struct {
	odds  *rand.Rand
	send  func([]byte)
	held  []byte
	timer *time.Timer
}

// NewProxy starts a proxy to target, "host:port". The seed is logged if the
// test fails.
func NewProxy(t testing.TB, target string, faults Faults) *Proxy {
	t.Helper()
	addr, err := net.ResolveUDPAddr("udp", target)
	if err != nil {
		t.Fatalf("coaptest: %v", err)
	}
	front, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatalf("coaptest: %v", err)
	}
	p := &Proxy{faults: faults, target: addr.AddrPort(), front: front, flows: map[netip.AddrPort]*flow{}}
	p.tasks.Go(p.readFront)
	t.Cleanup(func() {
		p.Close()
		if t.Failed() {
			t.Logf("coaptest: seed %d: %+v", faults.Seed, p.Counters())
		}
	})
	return p
}

// Addr is where clients connect to, "127.0.0.1:port".
func (p *Proxy) Addr() string { return p.front.LocalAddr().String() }

// Counters are the counts so far.
func (p *Proxy) Counters() Counters {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counters
}

// Close ends the proxy before its test does.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.closed = true
	_ = p.front.Close()
	for _, f := range p.flows {
		_ = f.back.Close()
		for i := range f.paths {
			if timer := f.paths[i].timer; timer != nil {
				timer.Stop()
			}
		}
	}
	p.mu.Unlock()
	p.tasks.Wait()
}

func (p *Proxy) readFront() {
	buf := make([]byte, 1<<16)
	for {
		n, client, err := p.front.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of a client that left
		}
		p.mu.Lock()
		if f := p.flowOf(client); f != nil {
			p.forward(f, ToServer, append([]byte(nil), buf[:n]...))
		}
		p.mu.Unlock()
	}
}

// flowOf is called with the lock held. It returns nil after close.
func (p *Proxy) flowOf(client netip.AddrPort) *flow {
	if f := p.flows[client]; f != nil || p.closed {
		return f
	}
	back, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(p.target))
	if err != nil {
		return nil
	}
	f := &flow{client: len(p.flows), addr: client, back: back}
	// Nobody waits for what a closed socket did not take.
	f.paths[ToServer].send = func(b []byte) { _, _ = back.Write(b) }
	f.paths[ToClient].send = func(b []byte) { _, _ = p.front.WriteToUDPAddrPort(b, client) }
	for direction := range f.paths {
		f.paths[direction].odds = rand.New(rand.NewPCG(p.faults.Seed, uint64(f.client)<<1|uint64(direction)))
	}
	p.flows[client] = f
	p.tasks.Go(func() { p.readBack(f) })
	return f
}

func (p *Proxy) readBack(f *flow) {
	buf := make([]byte, 1<<16)
	for {
		n, err := f.back.Read(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // the server's port is closed: UDP is silent about it here
		}
		p.mu.Lock()
		p.forward(f, ToClient, append([]byte(nil), buf[:n]...))
		p.mu.Unlock()
	}
}

// forward is called with the lock held.
func (p *Proxy) forward(f *flow, direction Direction, payload []byte) {
	count := &p.counters.ToServer
	if direction == ToClient {
		count = &p.counters.ToClient
	}
	count.Datagrams++
	count.Bytes += len(payload)
	path := &f.paths[direction]
	// Three draws for every datagram, whatever the hook says: the sequence
	// stays the same.
	lose, double, delay := path.odds.Float64(), path.odds.Float64(), path.odds.Float64()
	datagram := Datagram{
		Direction: direction, Number: p.counters.ToServer.Datagrams + p.counters.ToClient.Datagrams,
		Client: f.client, Payload: payload,
	}
	if p.faults.Tamper != nil {
		if instead, tampered := p.faults.Tamper(datagram); tampered {
			p.counters.Tampered++
			for _, datagram := range instead {
				path.send(datagram)
			}
			return
		}
	}
	action := Draw
	if p.faults.Hook != nil {
		action = p.faults.Hook(datagram)
	}
	if action == Draw {
		switch {
		case lose < p.faults.Loss:
			action = Drop
		case double < p.faults.Duplicate:
			action = Twice
		case delay < p.faults.Reorder:
			action = Late
		}
	}
	switch action {
	case Drop:
		p.counters.Lost++
		return
	case Late:
		if path.held == nil {
			p.counters.Delayed++
			path.held = payload
			path.timer = time.AfterFunc(LateDelay, func() {
				p.mu.Lock()
				defer p.mu.Unlock()
				path.release()
			})
			return
		}
		// It overtakes the one that is held already.
	case Twice:
		p.counters.Duplicated++
		path.send(payload)
	}
	path.send(payload)
	if p.faults.Sent != nil {
		p.faults.Sent(datagram)
	}
	path.release()
}

// release sends what was held. It is called with the lock held.
func (p *path) release() {
	if p.held == nil {
		return
	}
	p.timer.Stop()
	p.send(p.held)
	p.held = nil
}
