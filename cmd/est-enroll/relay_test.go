package main

import (
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// relay hands TCP connections on to a server of HTTPS, and counts them and their bytes.
type relay struct {
	listener           net.Listener
	server             string // host:port
	done               sync.WaitGroup
	connections        atomic.Int64
	toServer, toClient atomic.Int64
	// instead is what a client gets in the server's place, nil for the server's own.
	instead atomic.Pointer[[]byte]
}

func newRelay(t *testing.T, server string) *relay {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{listener: listener, server: strings.TrimPrefix(server, "https://")}
	r.done.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return // closed
			}
			r.connections.Add(1)
			r.done.Go(func() { r.serve(t, client) })
		}
	})
	return r
}

func (r *relay) uri() string { return "https://" + r.listener.Addr().String() }

// tally counts what is written to it.
type tally struct{ *atomic.Int64 }

func (n tally) Write(p []byte) (int, error) {
	n.Add(int64(len(p)))
	return len(p), nil
}

// serve ends with both sides: where one ends, the other is told.
func (r *relay) serve(t *testing.T, client net.Conn) {
	defer client.Close()
	if instead := r.instead.Load(); instead != nil {
		n, _ := client.Write(*instead)
		r.toClient.Add(int64(n))
		_, _ = io.Copy(io.Discard, client)
		return
	}
	server, err := net.Dial("tcp", r.server)
	if err != nil {
		t.Error(err)
		return
	}
	defer server.Close()
	var ways sync.WaitGroup
	for _, way := range []struct {
		from, to net.Conn
		bytes    *atomic.Int64
	}{{client, server, &r.toServer}, {server, client, &r.toClient}} {
		ways.Go(func() {
			if _, err := io.Copy(way.to, io.TeeReader(way.from, tally{way.bytes})); err != nil {
				_ = way.from.Close() // the one that it is for has gone
			}
			_ = way.to.(*net.TCPConn).CloseWrite()
		})
	}
	ways.Wait()
}

// close waits for the connections to end, and returns how many there were and their
// bytes, both ways.
func (r *relay) close(t *testing.T) (connections, bytes int) {
	t.Helper()
	if err := r.listener.Close(); err != nil {
		t.Error(err)
	}
	r.done.Wait()
	return int(r.connections.Load()), int(r.toServer.Load() + r.toClient.Load())
}
