package main

import (
	"bytes"
	"encoding/binary"
	"slices"

	"estenroll/internal/coap"
	"estenroll/internal/coap/coaptest"
)

// What somebody on the network can do to a DTLS 1.2 handshake and to what comes
// after it: the records of both are changed, lost or answered in the server's
// place (RFC 6347 §4.1, §4.2.2).

// tamper is what becomes of a datagram that the server sends.
type tamper func(records []record) (instead [][]byte, tampered bool)

// record is a DTLS record, with its header of 13 bytes.
type record []byte

const (
	recordHeader    = 13
	handshakeHeader = 12

	changeCipherSpec = 20
	alertRecord      = 21
	handshakeRecord  = 22
	applicationData  = 23

	serverHello        = 2
	helloVerifyRequest = 3
)

func records(datagram []byte) []record {
	var all []record
	for len(datagram) >= recordHeader {
		size := min(recordHeader+int(binary.BigEndian.Uint16(datagram[11:])), len(datagram))
		all = append(all, record(datagram[:size]))
		datagram = datagram[size:]
	}
	return all
}

func (r record) epoch() uint16 { return binary.BigEndian.Uint16(r[3:]) }

// flight is the flight of the server's that a record belongs to
// (RFC 6347 §4.2.4), 0 for what is no part of the handshake.
func (r record) flight() int {
	switch {
	case r[0] == changeCipherSpec, r[0] == handshakeRecord && r.epoch() == 1:
		return 6
	case r[0] == handshakeRecord && r[recordHeader] == helloVerifyRequest:
		return 2
	case r[0] == handshakeRecord:
		return 4
	}
	return 0
}

func ofFlight(flight int) func(record) bool {
	return func(r record) bool { return r.flight() == flight }
}

func isApplicationData(r record) bool { return r[0] == applicationData }

// silence loses the datagrams with such a record.
func silence(which func(record) bool) tamper {
	return func(records []record) ([][]byte, bool) { return nil, slices.ContainsFunc(records, which) }
}

// alerted puts a fatal alert in the place of a flight.
func alerted(flight int, description coap.Alert) tamper {
	return func(records []record) ([][]byte, bool) {
		at := slices.IndexFunc(records, ofFlight(flight))
		if at < 0 {
			return nil, false
		}
		// In the clear: nobody but the server has the keys.
		return [][]byte{records[at].forged(alertRecord, 0, 2, byte(description))}, true
	}
}

// forged is a record of another type, epoch and content with the number of this
// one; in another epoch it is a number that has not been.
func (r record) forged(kind byte, epoch uint16, content ...byte) []byte {
	made := slices.Clone(r[:recordHeader])
	made[0] = kind
	if binary.BigEndian.PutUint16(made[3:], epoch); epoch != r.epoch() {
		made[6] = 1
	}
	binary.BigEndian.PutUint16(made[11:], uint16(len(content)))
	return append(made, content...)
}

// cut takes bytes off the end of each datagram with such a record.
func cut(which func(record) bool) tamper {
	return changed(which, func(datagram []byte) []byte { return datagram[:len(datagram)-3] })
}

// extended puts bytes after the last record of each datagram with such a record.
func extended(which func(record) bool) tamper {
	return changed(which, func(datagram []byte) []byte { return append(datagram, 0, 0, 0) })
}

func changed(which func(record) bool, change func([]byte) []byte) tamper {
	return func(records []record) ([][]byte, bool) {
		if !slices.ContainsFunc(records, which) {
			return nil, false
		}
		return [][]byte{change(joined(records))}, true
	}
}

func joined(records []record) []byte {
	var datagram []byte
	for _, r := range records {
		datagram = append(datagram, r...)
	}
	return datagram
}

// hello changes the body of the ServerHello: version, random, session_id, the
// suite, the compression method and the extensions (RFC 5246 §7.4.1.3).
func hello(change func(body []byte) []byte) tamper {
	return func(records []record) ([][]byte, bool) {
		at := slices.IndexFunc(records, func(r record) bool { return r.flight() == 4 && r[recordHeader] == serverHello })
		if at < 0 {
			return nil, false
		}
		const begin = recordHeader + handshakeHeader
		old := records[at]
		body := change(slices.Clone([]byte(old[begin:])))
		made := append(slices.Clone(old[:begin]), body...)
		binary.BigEndian.PutUint16(made[11:], uint16(handshakeHeader+len(body)))
		made[recordHeader+2], made[recordHeader+3] = byte(len(body)>>8), byte(len(body))   // length
		made[recordHeader+10], made[recordHeader+11] = byte(len(body)>>8), byte(len(body)) // fragment_length
		records = slices.Clone(records)
		records[at] = made
		return [][]byte{joined(records)}, true
	}
}

// suite is where the suite of a ServerHello is.
func suiteOf(body []byte) int { return 2 + 32 + 1 + int(body[34]) }

func withSuite(suite uint16) tamper {
	return hello(func(body []byte) []byte {
		binary.BigEndian.PutUint16(body[suiteOf(body):], suite)
		return body
	})
}

func withVersion(version uint16) tamper {
	return hello(func(body []byte) []byte {
		binary.BigEndian.PutUint16(body, version)
		return body
	})
}

// withoutExtendedMasterSecret takes the extension out (RFC 7627 §5.1).
func withoutExtendedMasterSecret() tamper {
	return hello(func(body []byte) []byte {
		extensions := suiteOf(body) + 3
		at := bytes.Index(body[extensions+2:], []byte{0, 0x17, 0, 0})
		if at < 0 {
			return body
		}
		body = slices.Delete(body, extensions+2+at, extensions+2+at+4)
		binary.BigEndian.PutUint16(body[extensions:], uint16(len(body)-extensions-2))
		return body
	})
}

// chosen is a ServerHello of TLS 1.2 or before (RFC 5246 §7.4.1.3), in a record, by
// somebody who chooses in the server's place what it would not.
func chosen(version, suite uint16, random [32]byte) []byte {
	body := binary.BigEndian.AppendUint16(nil, version)
	body = append(body, random[:]...)
	body = append(body, 0) // no session to resume
	body = binary.BigEndian.AppendUint16(body, suite)
	body = append(body, 0) // no compression
	message := append([]byte{serverHello, 0, 0, byte(len(body))}, body...)
	return append([]byte{handshakeRecord, 3, 3, 0, byte(len(message))}, message...)
}

// downgraded is how a server of TLS 1.3 marks a handshake of TLS 1.2 (RFC 8446 §4.1.3).
func downgraded() (random [32]byte) {
	copy(random[24:], "DOWNGRD\x01")
	return random
}

// onServer makes a tamper of a proxy that changes what the server sends.
func onServer(current func() tamper) func(coaptest.Datagram) ([][]byte, bool) {
	return func(d coaptest.Datagram) ([][]byte, bool) {
		change := current()
		if change == nil || d.Direction != coaptest.ToClient {
			return nil, false
		}
		return change(records(d.Payload))
	}
}
