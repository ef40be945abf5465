package coap

import (
	"errors"
	"io"
	"net"
	"sync"
)

const (
	maxAssociations = 1024 // of a server's socket
	maxQueued       = 64   // datagrams that an association has not read yet
)

// listener gives each client of a UDP socket an association of its own. pion's has no
// place for a connection's own wrapper, which records its handshake.
type listener struct {
	udp      *net.UDPConn
	accepted chan *association
	done     chan struct{} // closed with the socket
	reading  sync.WaitGroup

	mu           sync.Mutex
	err          error // why done is closed
	associations map[string]*association
}

// association is what one address sends and gets. Its deadlines and its end are those
// of a pipe, whose other end a goroutine feeds.
type association struct {
	net.Conn
	listener *listener
	feed     net.Conn
	queue    chan []byte
	remote   *net.UDPAddr
	once     sync.Once
	closed   chan struct{}
}

func listenUDP(addr string) (*listener, error) {
	local, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return nil, err
	}
	udp, err := net.ListenUDP("udp", local)
	if err != nil {
		return nil, err
	}
	l := &listener{udp: udp, accepted: make(chan *association, maxAssociations), done: make(chan struct{}), associations: map[string]*association{}}
	l.reading.Go(l.read)
	return l, nil
}

func (l *listener) Addr() net.Addr { return l.udp.LocalAddr() }

// Accept waits for the next association.
func (l *listener) Accept() (*association, error) {
	select {
	case a := <-l.accepted:
		return a, nil
	case <-l.done:
		return nil, l.err
	}
}

// Close closes the socket, and with it what has not ended yet.
func (l *listener) Close() error {
	err := l.udp.Close()
	l.reading.Wait()
	return err
}

func (l *listener) read() {
	defer func() {
		l.mu.Lock()
		open := l.associations
		l.associations = nil
		l.mu.Unlock()
		close(l.done)
		for _, a := range open {
			_ = a.Close()
		}
	}()
	for buf := make([]byte, maxDatagram); ; {
		n, from, err := l.udp.ReadFromUDP(buf)
		if err != nil {
			l.err = err
			return
		}
		if a := l.association(from, buf[:n]); a != nil {
			select {
			case a.queue <- append([]byte(nil), buf[:n]...):
			default: // lost, as on the network
			}
		}
	}
}

// association returns that of an address. A handshake begins one, nothing else.
func (l *listener) association(from *net.UDPAddr, datagram []byte) *association {
	const handshakeRecord = 22
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.associations[from.String()]
	if a != nil || len(datagram) == 0 || datagram[0] != handshakeRecord || len(l.associations) == maxAssociations {
		return a
	}
	near, far := net.Pipe()
	a = &association{Conn: near, listener: l, feed: far, queue: make(chan []byte, maxQueued), remote: from, closed: make(chan struct{})}
	select {
	case l.accepted <- a:
		l.associations[from.String()] = a
		l.reading.Go(a.pass)
	default:
		return nil // nobody accepts
	}
	return a
}

// pass feeds the pipe: one write for each datagram, which one read takes.
func (a *association) pass() {
	for {
		select {
		case datagram := <-a.queue:
			if _, err := a.feed.Write(datagram); err != nil {
				return
			}
		case <-a.closed:
			return
		}
	}
}

// ReadFrom implements net.PacketConn, for buffers that take any datagram.
func (a *association) ReadFrom(p []byte) (int, net.Addr, error) {
	n, err := a.Conn.Read(p)
	if errors.Is(err, io.ErrClosedPipe) {
		err = net.ErrClosed
	}
	return n, a.remote, err
}

// WriteTo implements net.PacketConn.
func (a *association) WriteTo(p []byte, _ net.Addr) (int, error) {
	select {
	case <-a.closed:
		return 0, net.ErrClosed
	default:
		return a.listener.udp.WriteToUDP(p, a.remote)
	}
}

// LocalAddr and RemoteAddr are the socket's and the client's.
func (a *association) LocalAddr() net.Addr  { return a.listener.Addr() }
func (a *association) RemoteAddr() net.Addr { return a.remote }

// Close ends the association, not the socket.
func (a *association) Close() error {
	a.once.Do(func() {
		close(a.closed)
		_ = a.Conn.Close()
		_ = a.feed.Close()
		a.listener.mu.Lock()
		defer a.listener.mu.Unlock()
		if a.listener.associations[a.remote.String()] == a {
			delete(a.listener.associations, a.remote.String())
		}
	})
	return nil
}
