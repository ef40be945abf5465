package coap

import (
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

// maxWaiting bounds the associations that nobody has accepted, and the datagrams
// that an association has not read; what comes beyond is lost, as UDP may.
const maxWaiting = 128

// socket is a server's UDP socket: a [dtlsnet.PacketListener] that sorts what arrives
// by who sent it. It is ours because pion's own gives everything of an address
// to the first association. Measured: pion v3.1.15 then does not answer a new
// client's hello until the old association ends, in minutes, and a client that was
// killed does not end its association.
//
// RFC 6347 §4.2.8: a server with an association that receives a hello of epoch 0
// "SHOULD proceed with a new handshake but MUST NOT destroy the existing
// association until the client has demonstrated reachability". So the hello of a
// new client, which its random tells from a late copy, gets an association of its
// own, whose client has to return a cookie. The first ServerHello on it says that
// the cookie was right: it takes the address over. Until then nothing but hellos
// reaches it, and a forged hello costs the client of the address nothing.
type socket struct {
	udp      *net.UDPConn
	accepted chan *association
	closing  chan struct{}
	reading  sync.WaitGroup

	mu    sync.Mutex
	once  sync.Once
	peers map[netip.AddrPort]*peerAssociations
}

// peerAssociations are those of an address: one, and perhaps one that has not shown
// yet that it is more than a datagram with a forged sender.
type peerAssociations struct{ current, newcomer *association }

// listenUDP opens a socket.
func listenUDP(addr *net.UDPAddr) (*socket, error) {
	udp, err := net.ListenUDP("udp", addr)
	if err != nil {
		return nil, err
	}
	s := &socket{udp: udp, accepted: make(chan *association, maxWaiting), closing: make(chan struct{}), peers: map[netip.AddrPort]*peerAssociations{}}
	s.reading.Go(s.read)
	return s, nil
}

// Accept returns the next association, until Close.
func (s *socket) Accept() (net.PacketConn, net.Addr, error) {
	select {
	case a := <-s.accepted:
		return a, a.remote, nil
	case <-s.closing:
		return nil, nil, net.ErrClosed
	}
}

// Close ends Accept. The associations go on until shut.
func (s *socket) Close() error {
	s.once.Do(func() { close(s.closing) })
	return nil
}

// shut closes the socket under all associations.
func (s *socket) shut() error {
	err := s.udp.Close()
	s.reading.Wait()
	return err
}

// Addr is the address that is listened on.
func (s *socket) Addr() net.Addr { return s.udp.LocalAddr() }

func (s *socket) read() {
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := s.udp.ReadFromUDPAddrPort(buf)
		if err != nil {
			return // an unconnected socket has no error but its end
		}
		if a := s.associationOf(from, buf[:n]); a != nil {
			a.push(append([]byte(nil), buf[:n]...))
		}
	}
}

// associationOf finds the association that a datagram is for, or begins it.
func (s *socket) associationOf(from netip.AddrPort, datagram []byte) *association {
	s.mu.Lock()
	defer s.mu.Unlock()
	random, isHello := helloRandom(datagram)
	peer := s.peers[from]
	switch {
	case peer == nil && !isHello:
		return nil
	case peer == nil:
		peer = new(peerAssociations)
	case !isHello || random == peer.current.random:
		return peer.current
	case peer.newcomer != nil && random == peer.newcomer.random:
		return peer.newcomer
	}
	a := &association{socket: s, from: from, remote: net.UDPAddrFromAddrPort(from), random: random}
	a.changed.L = &a.mu
	select {
	case s.accepted <- a:
	default:
		return nil // it will ask again
	}
	if peer.current == nil {
		peer.current = a
		s.peers[from] = peer
		return a
	}
	if peer.newcomer != nil {
		peer.newcomer.end()
	}
	peer.newcomer = a
	return a
}

// replace gives the address to its newcomer.
func (s *socket) replace(a *association) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if peer := s.peers[a.from]; peer != nil && peer.newcomer == a {
		peer.current.end()
		peer.current, peer.newcomer = a, nil
	}
}

// forget takes an association off its address.
func (s *socket) forget(a *association) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch peer := s.peers[a.from]; {
	case peer == nil:
	case peer.newcomer == a:
		peer.newcomer = nil
	case peer.current == a && peer.newcomer != nil:
		peer.current, peer.newcomer = peer.newcomer, nil
	case peer.current == a:
		delete(s.peers, a.from)
	}
}

// association is one client's part of the socket, a [net.PacketConn].
type association struct {
	socket *socket
	from   netip.AddrPort
	remote *net.UDPAddr
	random [32]byte // of the hello that began it

	mu       sync.Mutex
	changed  sync.Cond
	waiting  [][]byte
	ended    bool
	deadline time.Time
	timer    *time.Timer
}

func (a *association) push(datagram []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.waiting) < maxWaiting {
		a.waiting = append(a.waiting, datagram)
		a.changed.Broadcast()
	}
}

func (a *association) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ended = true
	a.changed.Broadcast()
}

// ReadFrom waits for a datagram, until the deadline or the end.
func (a *association) ReadFrom(p []byte) (int, net.Addr, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for {
		switch {
		case a.ended:
			return 0, nil, net.ErrClosed
		case !a.deadline.IsZero() && !time.Now().Before(a.deadline):
			return 0, nil, os.ErrDeadlineExceeded
		case len(a.waiting) > 0:
			n := copy(p, a.waiting[0])
			a.waiting = a.waiting[1:]
			return n, a.remote, nil
		}
		a.changed.Wait()
	}
}

// WriteTo sends a datagram. A ServerHello comes after the cookie exchange.
func (a *association) WriteTo(p []byte, _ net.Addr) (int, error) {
	a.mu.Lock()
	ended := a.ended
	a.mu.Unlock()
	if ended {
		return 0, net.ErrClosed
	}
	if isServerHello(p) {
		a.socket.replace(a)
	}
	return a.socket.udp.WriteToUDPAddrPort(p, a.from)
}

// Close ends the association, not the socket.
func (a *association) Close() error {
	a.end()
	a.socket.forget(a)
	return nil
}

// LocalAddr is the socket's.
func (a *association) LocalAddr() net.Addr { return a.socket.Addr() }

// SetReadDeadline bounds a ReadFrom under way and those to come.
func (a *association) SetReadDeadline(deadline time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.timer != nil {
		a.timer.Stop()
		a.timer = nil
	}
	if a.deadline = deadline; !deadline.IsZero() {
		a.timer = time.AfterFunc(time.Until(deadline), a.changed.Broadcast)
	}
	a.changed.Broadcast()
	return nil
}

// SetWriteDeadline does nothing: a datagram does not wait.
func (a *association) SetWriteDeadline(time.Time) error { return nil }

// SetDeadline sets the deadline of ReadFrom.
func (a *association) SetDeadline(deadline time.Time) error { return a.SetReadDeadline(deadline) }

// A handshake message in the clear, at the beginning of a datagram:
//
//	record:    type(1) version(2) epoch(2) sequence_number(6) length(2), RFC 6347 §4.1
//	handshake: msg_type(1) length(3) message_seq(2) fragment_offset(3) fragment_length(3), RFC 6347 §4.2.2
//	hello:     version(2) random(32), RFC 5246 §7.4.1.2
const (
	helloType       = 13
	helloFragmentAt = 13 + 6
	helloRandomAt   = 13 + 12 + 2
	clientHelloType = 1
	serverHelloType = 2
)

// helloRandom reports a ClientHello, or its first fragment, and its random. Both
// hellos of a handshake have the same (RFC 6347 §4.2.1).
func helloRandom(datagram []byte) (random [32]byte, isHello bool) {
	if !beginsWith(clientHelloType, datagram) || len(datagram) < helloRandomAt+len(random) {
		return random, false
	}
	copy(random[:], datagram[helloRandomAt:])
	return random, true
}

func isServerHello(datagram []byte) bool { return beginsWith(serverHelloType, datagram) }

// beginsWith reports the first fragment of such a handshake message in epoch 0.
func beginsWith(messageType byte, datagram []byte) bool {
	const handshakeRecord = 22
	return len(datagram) > helloRandomAt && datagram[0] == handshakeRecord && datagram[3] == 0 && datagram[4] == 0 &&
		datagram[helloType] == messageType && datagram[helloFragmentAt] == 0 && datagram[helloFragmentAt+1] == 0 && datagram[helloFragmentAt+2] == 0
}
