package coap

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// ErrBodyTooLarge is a body beyond Config.MaxBody, ours or the peer's.
var ErrBodyTooLarge = errors.New("body too large")

// BlockError is a response that does not fit into the transfer it belongs to
// (RFC 7959 §2): a wrong number, size or order, or another representation.
type BlockError struct {
	Option string // "Block1" or "Block2"
	Reason string
}

func (e *BlockError) Error() string { return e.Option + ": " + e.Reason }

func block1Error(format string, args ...any) error {
	return &BlockError{Option: "Block1", Reason: fmt.Sprintf(format, args...)}
}

func block2Error(format string, args ...any) error {
	return &BlockError{Option: "Block2", Reason: fmt.Sprintf(format, args...)}
}

// Do sends a request and returns its response, each in as many blocks as it
// takes, before ExchangeTimeout or the context's deadline. It fails with
// ErrTimeout, ErrReset, ErrClosed, ErrBodyTooLarge, a *BlockError or an
// *OptionError; when the context is cancelled, with the context's error. It
// never sends a whole request twice: whether to is for the caller.
func (c *Conn) Do(ctx context.Context, req *Request) (*Response, error) {
	resp, err := c.do(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("%v %s: %w", req.Method, req.Path, err)
	}
	return resp, nil
}

func (c *Conn) do(ctx context.Context, req *Request) (*Response, error) {
	opts, err := requestOptions(req)
	if err != nil {
		return nil, err
	}
	if len(req.Body) > c.cfg.MaxBody {
		return nil, fmt.Errorf("request of %d bytes: %w: the limit is %d", len(req.Body), ErrBodyTooLarge, c.cfg.MaxBody)
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.ExchangeTimeout)
	defer cancel()
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, contextError(ctx)
	}
	defer func() { <-c.turn }()

	t := &transfer{conn: c, req: req, opts: opts, size: c.cfg.BlockSize}
	first, err := t.upload(ctx)
	if err != nil {
		return nil, err
	}
	return t.download(ctx, first)
}

// transfer is one request on its way.
type transfer struct {
	conn *Conn
	req  *Request
	opts options // in every message of the transfer
	size int     // of our blocks, and the largest we ask for
}

// part is one message of the server's.
type part struct {
	code    Code
	opts    *options
	payload []byte
}

func (t *transfer) exchange(ctx context.Context, opts options, payload []byte) (*part, error) {
	m, err := t.conn.exchange(ctx, t.req.Method, opts.encode(), payload)
	if err != nil {
		return nil, err
	}
	received, err := decodeOptions(m.Options)
	if err != nil {
		return nil, err
	}
	if asked, got := opts.block2, received.block2; asked != nil && got != nil && got.size > asked.size {
		// RFC 7959 §2.4: the server uses "the block size indicated or a smaller size".
		return nil, block2Error("%v when %v was asked for", got, asked)
	}
	return &part{code: m.Code, opts: received, payload: m.Payload}, nil
}

// wanted asks for blocks of our size from the first response on, unless it is
// the largest there is (early negotiation, RFC 7959 §2.4).
func (t *transfer) wanted() *block {
	if t.size == maxBlockSize {
		return nil
	}
	return &block{size: t.size}
}

// upload sends the body and returns the first message of the response. It
// begins again at most once: when the server lost its earlier blocks (4.08)
// before it had the last, or asks for smaller ones (4.13, RFC 7959 §2.9.3).
// Either way nothing was done with the body.
func (t *transfer) upload(ctx context.Context) (*part, error) {
	answer, again, err := t.uploadOnce(ctx)
	if err != nil || !again {
		return answer, err
	}
	answer, _, err = t.uploadOnce(ctx)
	return answer, err
}

func (t *transfer) uploadOnce(ctx context.Context) (answer *part, again bool, err error) {
	body, opts := t.req.Body, t.opts
	opts.contentFormat = t.req.ContentFormat
	if len(body) <= t.size {
		opts.block2 = t.wanted()
		answer, err := t.exchange(ctx, opts, body)
		if err != nil {
			return nil, false, err
		}
		if answer.code == codes.Continue {
			return nil, false, block1Error("2.31 to a request without the option")
		}
		return answer, t.smaller(answer, len(body)), nil
	}
	// RFC 9175 §3.3: a tag per transfer keeps the blocks of two apart. Within
	// one connection a counter is unique enough, and short.
	t.conn.mu.Lock()
	t.conn.nextTag++
	t.opts.requestTags = []string{string(encodeUint(t.conn.nextTag))}
	t.conn.mu.Unlock()
	opts.requestTags = t.opts.requestTags
	// RFC 7959 §4: the size of the whole body, in the first block only.
	opts.size1 = pointer(uint32(len(body)))

	for offset, initial := 0, t.size; ; {
		end := min(offset+t.size, len(body))
		sent := block{num: offset / t.size, more: end < len(body), size: t.size}
		opts.block1 = &sent
		if !sent.more {
			opts.block2 = t.wanted()
		}
		answer, err := t.exchange(ctx, opts, body[offset:end])
		if err != nil {
			return nil, false, err
		}
		opts.size1 = nil
		switch {
		case answer.code == codes.RequestEntityIncomplete:
			// Of the last block it proves nothing: a server that forgot its answer
			// says the same to a retransmission, and has done the work.
			return answer, sent.more, nil
		case answer.code == codes.RequestEntityTooLarge:
			return answer, t.smaller(answer, t.size), nil
		case answer.code>>5 != 2:
			return answer, false, nil
		}
		echo := answer.opts.block1
		switch {
		case echo != nil && echo.num != sent.num:
			return nil, false, block1Error("answered %v to %v", echo, sent)
		case echo != nil && echo.size > initial:
			// RFC 7959 §2.3: it is "the same or smaller than the one used in the
			// initial exchange".
			return nil, false, block1Error("answered %v to %v", echo, sent)
		case !sent.more && answer.code == codes.Continue:
			return nil, false, block1Error("2.31 to the last block")
		case !sent.more:
			return answer, false, nil
		case answer.code != codes.Continue:
			return nil, false, block1Error("%v before the last block", answer.code)
		case echo == nil:
			return nil, false, block1Error("2.31 without the option")
		}
		offset = end
		// RFC 7959 §2.3: the blocks to come have the smaller size, and their
		// numbers count the whole body in it.
		t.size = min(t.size, echo.size)
	}
}

// smaller takes up the hint of a 4.13 (RFC 7959 §2.9.3), if it would change anything.
func (t *transfer) smaller(answer *part, payload int) bool {
	hint := answer.opts.block1
	if answer.code != codes.RequestEntityTooLarge || hint == nil || hint.size >= payload {
		return false
	}
	t.size = hint.size
	return true
}

// download completes the response that begins with first (RFC 7959 §2.4).
func (t *transfer) download(ctx context.Context, first *part) (*Response, error) {
	resp := &Response{
		Code: first.code, ContentFormat: first.opts.contentFormat,
		MaxAge: first.opts.maxAge, ETag: first.opts.etag, Body: first.payload,
	}
	limit := t.conn.cfg.MaxBody
	if first.opts.size2 != nil && uint64(*first.opts.size2) > uint64(limit) {
		return nil, fmt.Errorf("response of %d bytes: %w: the limit is %d", *first.opts.size2, ErrBodyTooLarge, limit)
	}
	offset := 0
	for next := first; next.opts.block2 != nil; {
		got := *next.opts.block2
		switch {
		case got.offset() != offset:
			return nil, block2Error("got %v at offset %d", got, offset)
		case got.more && len(next.payload) != got.size || len(next.payload) > got.size:
			return nil, block2Error("%d bytes in %v", len(next.payload), got)
		case offset+len(next.payload) > limit:
			return nil, fmt.Errorf("response: %w: the limit is %d", ErrBodyTooLarge, limit)
		}
		if offset > 0 {
			resp.Body = appendSecret(resp.Body, next.payload)
		}
		if !got.more {
			return resp, nil
		}
		offset += len(next.payload)
		size := min(t.size, got.size)
		opts := t.opts
		// RFC 7959 §3.3: a POST goes on with the method, no payload and Block2.
		opts.block2 = &block{num: offset / size, size: size}
		if opts.block2.num > maxBlockNumber {
			return nil, block2Error("more than %d blocks", maxBlockNumber)
		}
		var err error
		if next, err = t.exchange(ctx, opts, nil); err != nil {
			return nil, fmt.Errorf("the block at offset %d: %w", offset, err)
		}
		switch {
		case next.code>>5 != 2 && next.code != resp.Code:
			// The server cannot go on: its answer is the response.
			return &Response{
				Code: next.code, ContentFormat: next.opts.contentFormat, MaxAge: next.opts.maxAge, Body: next.payload,
			}, nil
		case next.opts.block2 == nil:
			return nil, block2Error("missing at offset %d", offset)
		case next.code != resp.Code:
			return nil, block2Error("%v after %v", next.code, resp.Code)
		case !bytes.Equal(next.opts.etag, resp.ETag):
			// RFC 7959 §2.4: blocks of one representation share its ETag.
			return nil, block2Error("ETag %x after %x", next.opts.etag, resp.ETag)
		case !equal(next.opts.contentFormat, resp.ContentFormat):
			return nil, block2Error("another content-format at offset %d", offset)
		}
	}
	if len(resp.Body) > limit {
		return nil, fmt.Errorf("response: %w: the limit is %d", ErrBodyTooLarge, limit)
	}
	return resp, nil
}

// appendSecret puts a block after the others. What they are of may be a key: no copy
// of it is left in the block, nor where the others were.
func appendSecret(body, block []byte) []byte {
	if len(body)+len(block) > cap(body) {
		larger := append(make([]byte, 0, 2*(len(body)+len(block))), body...)
		clear(body)
		body = larger
	}
	body = append(body, block...)
	clear(block)
	return body
}

func equal[T comparable](a, b *T) bool {
	return a == b || a != nil && b != nil && *a == *b
}
