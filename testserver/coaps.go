package testserver

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/est"
	"estenroll/internal/coap"
)

// listen opens a CoAPs front door (RFC 9148 §4.1).
func (s *Server) listen(address string, key crypto.Signer) (door, error) {
	if s.cfg.Raw {
		return s.listenRaw(key)
	}
	chain, err := s.presentedChain(key.Public())
	if err != nil {
		return nil, err
	}
	cfg := coap.Config{
		Certificate: chain,
		Chain: func() [][]byte {
			chain, err := s.presentedChain(key.Public())
			if err != nil {
				return nil // and the handshake fails
			}
			return chain
		},
		Key:             key,
		Verify:          s.verifyClient,
		BlockSize:       s.cfg.BlockSize,
		ProcessingDelay: s.cfg.ProcessingDelay,
		AckTimeout:      s.cfg.AckTimeout,
		FlightInterval:  s.cfg.FlightInterval,
		Logger:          s.cfg.Logger,
		// Clients that are killed, one after another, leave theirs behind for minutes.
		MaxConnections: 4096,
	}
	if len(s.cfg.PSKs) > 0 {
		cfg.PSKs = func(identity string) ([]byte, bool) {
			key, known := s.cfg.PSKs[identity]
			return slices.Clone(key), known
		}
	}
	server, err := coap.Listen(address, cfg)
	if err != nil {
		return nil, err // and no door, not even one of nothing
	}
	return server, nil
}

// serveCoAP answers at one of the doors.
func (s *Server) serveCoAP(linked bool) coap.Handler {
	return func(ctx context.Context, req *coap.Request) *coap.Response {
		resp := s.resource(ctx, req, linked)
		if resp.Code>>5 != 2 && s.Faults().LongDetail {
			resp.Body = longDetail
		}
		return resp
	}
}

// longDetail is what nobody wants in a log: it clears a terminal, forges a line,
// turns the writing direction, and is not all UTF-8.
var longDetail = slices.Concat(
	[]byte("\x1b[2J\r\nest-enroll: enrolled\x00\u202e\xff "), bytes.Repeat([]byte("the server has much to say. "), 3000/28))

func (s *Server) resource(ctx context.Context, req *coap.Request, linked bool) *coap.Response {
	if req.Path == corePath {
		return s.discover(req)
	}
	operation, found := s.operationAt(req.Path, linked)
	if !found {
		return diagnostic(codes.NotFound, "no such resource")
	}
	method := codes.POST
	if operation.Asks() {
		method = codes.GET
	}
	if req.Method != method {
		return diagnostic(codes.MethodNotAllowed, string(operation)+" is "+method.String())
	}
	var client *x509.Certificate // nil for a pre-shared key
	if len(req.Peer) > 0 {
		client = req.Peer[0]
	}
	if client == nil && (req.PSKIdentity == "" || operation == est.SimpleReenroll) {
		return diagnostic(codes.Unauthorized, "a client certificate is needed")
	}
	if faults := s.Faults(); client != nil && faults.RefuseCode != "" && faults.refuses(client, s.ca.Load()) {
		code := codes.Unauthorized
		if faults.RefuseCode == "4.03" {
			code = codes.Forbidden
		}
		return diagnostic(code, "the client certificate is refused")
	}
	switch operation {
	case est.CSRAttrs:
		if req.Accept != nil && *req.Accept != uint16(est.ContentFormatCSRAttrs) {
			return diagnostic(codes.NotAcceptable, "offered is 285")
		}
		return s.attributes()
	case est.CACerts:
		return s.answer(codes.Content, req, s.crts())
	}
	if req.ContentFormat == nil || *req.ContentFormat != uint16(est.ContentFormatPKCS10) {
		return diagnostic(codes.UnsupportedMediaType, "the content-format is not 286")
	}
	if generates(operation) {
		return s.keyed(ctx, req, enrollment{operation, req.Path, client, req.Body, req.ChannelBinding, req.PSKIdentity})
	}
	// Before anything is issued: an answer that cannot be given must not cost a
	// certificate.
	if s.accepted(req, s.answered(nil)) == 0 {
		return notAcceptable()
	}
	cert, err := s.enroll(ctx, enrollment{operation, req.Path, client, req.Body, req.ChannelBinding, req.PSKIdentity})
	if err != nil {
		return refused(err)
	}
	certs := s.answered(cert)
	resp := s.answer(codes.Changed, req, certs)
	if kind := s.Faults().Body; kind != "" {
		if err := s.shape(kind, resp, certs); err != nil {
			return diagnostic(codes.InternalServerError, err.Error())
		}
	}
	return resp
}

// keyed is the answer of skg and skc.
func (s *Server) keyed(ctx context.Context, req *coap.Request, asked enrollment) *coap.Response {
	if req.Accept != nil && *req.Accept != uint16(est.ContentFormatMultipartCore) {
		return diagnostic(codes.NotAcceptable, "offered is 62")
	}
	made, err := s.issueOnce(ctx, asked)
	if err != nil {
		return refused(err)
	}
	parts, err := s.serverKey(asked.operation, made)
	if err != nil {
		return diagnostic(codes.InternalServerError, err.Error())
	}
	if s.Faults().ServerKey == noMultipart {
		return &coap.Response{Code: codes.Changed, ContentFormat: new(uint16(parts[0].ContentFormat)), Body: parts[0].Body}
	}
	body, err := est.MarshalMultipartCore(parts)
	if err != nil {
		return diagnostic(codes.InternalServerError, err.Error())
	}
	return &coap.Response{Code: codes.Changed, ContentFormat: new(uint16(est.ContentFormatMultipartCore)), Body: body}
}

// answered is the answer of sen and sren.
func (s *Server) answered(cert *x509.Certificate) []*x509.Certificate {
	answer := []*x509.Certificate{cert}
	if s.cfg.AnswerChain {
		answer = append(answer, s.ca.Load().chain()...)
	}
	if s.cfg.AnswerRoot {
		answer = append(answer, s.ca.Load().root.cert)
	}
	return answer
}

// accepted picks the format of an answer, 0 for none. RFC 9148 §4.3: without
// Accept "the server SHOULD choose format 281", and 287 carries "a single
// certificate".
func (s *Server) accepted(req *coap.Request, certs []*x509.Certificate) est.ContentFormat {
	if req.Accept == nil {
		return est.ContentFormatPKCS7CertsOnly
	}
	switch format := est.ContentFormat(*req.Accept); {
	case format == est.ContentFormatPKCS7CertsOnly:
		return format
	case format == est.ContentFormatPKIXCert && len(certs) == 1:
		return format
	}
	return 0
}

func (s *Server) answer(code codes.Code, req *coap.Request, certs []*x509.Certificate) *coap.Response {
	format := s.accepted(req, certs)
	body := certs[0].Raw
	switch format {
	case 0:
		return notAcceptable()
	case est.ContentFormatPKCS7CertsOnly:
		var err error
		if body, err = est.MarshalCertsOnly(certs); err != nil {
			return diagnostic(codes.InternalServerError, err.Error())
		}
	}
	return &coap.Response{Code: code, ContentFormat: new(uint16(format)), Body: body}
}

func notAcceptable() *coap.Response {
	return diagnostic(codes.NotAcceptable, "offered are 281, and 287 for a single certificate")
}

// refused maps a refusal as RFC 9148 §4.5 does.
func refused(err error) *coap.Response {
	var refusal *refusal
	if !errors.As(err, &refusal) {
		return diagnostic(codes.InternalServerError, err.Error())
	}
	switch refusal.kind {
	case refusedAs:
		return diagnostic(refusal.code, refusal.detail)
	case refusedClient:
		return diagnostic(codes.Forbidden, refusal.detail)
	case refusedForNow:
		resp := diagnostic(codes.ServiceUnavailable, refusal.detail)
		if refusal.retryAfter != nil {
			resp.MaxAge = new(uint32(*refusal.retryAfter / time.Second))
		}
		return resp
	}
	return diagnostic(codes.BadRequest, refusal.detail)
}

// diagnostic is an answer for a person to read (RFC 7252 §5.5.2).
func diagnostic(code codes.Code, text string) *coap.Response {
	return &coap.Response{Code: code, Body: []byte(text)}
}
