package coap

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"

	"github.com/pion/dtls/v3/pkg/crypto/prf"
)

// errNoBinding is a handshake whose messages were not all seen.
var errNoBinding = errors.New("channel binding: the handshake was not recorded whole")

const (
	maxHandshakeMessages = 64 // of one end
	maxHandshake         = 128 << 10
)

// recorder takes down what both ends say in the clear in a handshake, and its master
// secret, to compute tls-unique: the first Finished, which is the client's
// (RFC 5929 §3.1). pion v3.1.15 does not tell it. A recorder is a connection's alone;
// it forgets everything when the value is computed.
type recorder struct {
	mu     sync.Mutex
	client flight
	server flight
	bytes  int
	secret []byte
}

// flight holds the messages of one end by their message_seq.
type flight map[uint16]*handshakeMessage

// handshakeMessage is put together of its fragments; of each byte the first copy counts.
type handshakeMessage struct {
	kind byte
	body []byte
	have []bool
}

func newRecorder() *recorder { return &recorder{client: flight{}, server: flight{}} }

// Types of handshake messages (RFC 6347 §4.3.2).
const (
	typeHelloRequest       = 0
	typeClientHello        = 1
	typeHelloVerifyRequest = 3
)

// sent notes a datagram of the client, received one of the server.
func (r *recorder) sent(datagram []byte)     { r.note(datagram, func() flight { return r.client }) }
func (r *recorder) received(datagram []byte) { r.note(datagram, func() flight { return r.server }) }

// note reads the records of a datagram:
//
//	record:    type(1) version(2) epoch(2) sequence_number(6) length(2), RFC 6347 §4.1
//	handshake: msg_type(1) length(3) message_seq(2) fragment_offset(3) fragment_length(3), RFC 6347 §4.2.2
func (r *recorder) note(datagram []byte, of func() flight) {
	const recordHeader, header, handshakeRecord, recordWithID = 13, 12, 22, 25
	r.mu.Lock()
	defer r.mu.Unlock()
	to := of()
	for len(datagram) >= recordHeader && datagram[0] != recordWithID && to != nil {
		end := recordHeader + int(datagram[11])<<8 + int(datagram[12])
		if end > len(datagram) {
			return
		}
		record := datagram[:end]
		datagram = datagram[end:]
		if record[0] != handshakeRecord || record[3] != 0 || record[4] != 0 {
			continue
		}
		for content := record[recordHeader:]; len(content) >= header; {
			length := number24(content[9:])
			if length > len(content)-header {
				break
			}
			r.fragment(to, content[:header], content[header:header+length])
			content = content[header+length:]
		}
	}
}

func number24(b []byte) int { return int(b[0])<<16 | int(b[1])<<8 | int(b[2]) }

func (r *recorder) fragment(to flight, header, fragment []byte) {
	seq, length, offset := uint16(header[4])<<8|uint16(header[5]), number24(header[1:]), number24(header[6:])
	message := to[seq]
	if message == nil {
		if len(to) == maxHandshakeMessages || r.bytes+length > maxHandshake {
			return // that it is not whole shows in the end
		}
		r.bytes += length
		message = &handshakeMessage{header[0], make([]byte, length), make([]bool, length)}
		to[seq] = message
	}
	if message.kind != header[0] || len(message.body) != length || offset+len(fragment) > length {
		return
	}
	for i, b := range fragment {
		if !message.have[offset+i] {
			message.body[offset+i], message.have[offset+i] = b, true
		}
	}
}

// Write takes a line of pion's key log: "CLIENT_RANDOM", the random, the secret.
func (r *recorder) Write(line []byte) (int, error) {
	fields := bytes.Fields(line)
	if len(fields) != 3 {
		return 0, errNoBinding
	}
	secret := make([]byte, hex.DecodedLen(len(fields[2])))
	if _, err := hex.Decode(secret, fields[2]); err != nil {
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.secret = secret
	return len(line), nil
}

// tlsUnique computes the client's Finished of a full handshake. All suites that we
// offer hash with SHA-256 (RFC 5246 §7.4.9).
func (r *recorder) tlsUnique() ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.forget()
	transcript, err := r.transcript()
	if err != nil {
		return nil, err
	}
	value, err := prf.VerifyDataClient(r.secret, transcript, sha256.New)
	if err != nil {
		return nil, fmt.Errorf("channel binding: %w", err)
	}
	return value, nil
}

func (r *recorder) forget() {
	clear(r.secret)
	r.client, r.server, r.secret = nil, nil, nil
}

// transcript is what Finished covers: all messages, but for the first ClientHello
// and the HelloVerifyRequest where there was one (RFC 6347 §4.2.1), "as if each
// handshake message had been sent as a single fragment" (§4.2.6). The client's hello
// comes first, then all of the server's, then what the client says to that.
func (r *recorder) transcript() ([]byte, error) {
	hello, answered := -1, false
	for seq, message := range r.client {
		if message.kind == typeClientHello {
			hello = max(hello, int(seq))
		} else {
			answered = true
		}
	}
	if hello < 0 || !answered || len(r.server) == 0 || len(r.secret) == 0 {
		return nil, errNoBinding // or a session that was resumed: there is none here
	}
	var transcript []byte
	add := func(from flight, seq uint16, kinds ...byte) error {
		message := from[seq]
		if slices.Contains(kinds, message.kind) {
			return nil
		}
		if slices.Contains(message.have, false) {
			return errNoBinding
		}
		length := []byte{byte(len(message.body) >> 16), byte(len(message.body) >> 8), byte(len(message.body))}
		transcript = slices.Concat(transcript, []byte{message.kind}, length, []byte{byte(seq >> 8), byte(seq)}, []byte{0, 0, 0}, length, message.body)
		return nil
	}
	err := add(r.client, uint16(hello))
	for _, seq := range slices.Sorted(maps.Keys(r.server)) {
		err = errors.Join(err, add(r.server, seq, typeHelloRequest, typeHelloVerifyRequest))
	}
	for _, seq := range slices.Sorted(maps.Keys(r.client)) {
		err = errors.Join(err, add(r.client, seq, typeClientHello))
	}
	return transcript, err
}

// recordedConn is a server's association whose handshake is recorded.
type recordedConn struct {
	net.PacketConn
	recorder *recorder
}

func (c recordedConn) ReadFrom(p []byte) (int, net.Addr, error) {
	n, from, err := c.PacketConn.ReadFrom(p)
	if err == nil {
		c.recorder.sent(p[:n]) // the peer is the client
	}
	return n, from, err
}

func (c recordedConn) WriteTo(p []byte, to net.Addr) (int, error) {
	c.recorder.received(p)
	return c.PacketConn.WriteTo(p, to)
}
