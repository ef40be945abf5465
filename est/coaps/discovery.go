package coaps

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"estenroll/est"
	"estenroll/internal/coap"
)

const (
	wellKnownCore = "/.well-known/core" // RFC 6690 §4
	// maxIgnored bounds the links of one server that a warning names.
	maxIgnored = 3
	maxShown   = 80   // bytes of such a link
	maxTarget  = 1024 // bytes of a link that is followed
	// maxServers bounds the other servers that the links of one may name: an
	// operation there costs a handshake.
	maxServers = 4
)

// resource is where an operation is, and what it answers with: the URI's root is
// the whole path.
type resource struct {
	uri    est.URI
	accept est.ContentFormat
}

// required are those that "MUST be returned if the server supports resource
// discovery" (RFC 9148 §4.1); others are listed where they are.
var (
	required   = []est.Operation{est.CACerts, est.SimpleEnroll, est.SimpleReenroll}
	operations = append(slices.Clone(required), est.CSRAttrs, est.ServerKeyGen, est.ServerKeyGenCert)
)

// discover asks the server where its EST resources are (RFC 9148 §4.1, RFC 6690
// §4.1): over this same, authenticated session, never in the clear on CoAP's own port,
// where the answer could be anybody's. A link may name another host and port, whose
// server is then one that For judges; a session that is provisional, or by a pre-shared
// key, which is for one server, is led nowhere. What the server does not answer stays
// below the URI's root, which "every server supports", with a warning. The error is one
// of the connection or of the context, with which the session is of no use.
func (s *Session) discover(ctx context.Context) error {
	at, warn := s.uri, s.cfg.Warn
	at.Root = wellKnownCore
	fallBack := func(reason error) {
		warn("discovery at %s: %v: %s is used", at, reason, s.uri.Root)
	}
	response, err := s.conn.Do(ctx, &coap.Request{Method: codeGET, Path: wellKnownCore, Query: []string{"rt=ace.est*"}})
	switch {
	case err != nil && (ctx.Err() != nil || errors.Is(err, coap.ErrClosed)):
		return fmt.Errorf("discovery at %s: %w", at, classify(ctx, err))
	case err != nil:
		fallBack(err)
		return nil
	}
	links, err := readLinks(response)
	if err != nil {
		fallBack(err)
		return nil
	}
	offered, ignored := candidates(s.uri, links, !s.cfg.Provisional && s.cfg.PSK == nil)
	if len(ignored) > maxIgnored {
		ignored = append(ignored[:maxIgnored], fmt.Sprintf("%d more", len(ignored)-maxIgnored))
	}
	if len(ignored) > 0 {
		warn("discovery at %s: not followed: %s", at, strings.Join(ignored, ", "))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resources = map[est.Operation]resource{}
	var missing []string
	for _, operation := range operations {
		if len(offered[operation]) == 0 && !slices.Contains(required, operation) {
			s.absent = append(s.absent, operation)
			continue
		}
		found, err := pick(s.uri, offered[operation], s.cfg.Label)
		if err != nil {
			missing = append(missing, fmt.Sprintf("%s: %v", operation, err))
			continue
		}
		s.resources[operation] = found
	}
	if len(missing) > 0 {
		fallBack(errors.New(strings.Join(missing, "; ")))
	}
	return nil
}

// readLinks takes a document that says what it is, or does not say.
func readLinks(response *coap.Response) ([]est.Link, error) {
	if class := int(response.Code) >> 5; class != 2 {
		text := codeText(response.Code)
		if detail := est.NewDetail(response.Body); detail != "" {
			text += fmt.Sprintf(": %q", detail)
		}
		return nil, errors.New(text)
	}
	if format := response.ContentFormat; format != nil && *format != uint16(est.ContentFormatLinkFormat) {
		return nil, fmt.Errorf("content-format %d, want %d", *format, est.ContentFormatLinkFormat)
	}
	return est.ParseLinks(response.Body)
}

// candidates are the resources that links offer for each operation, on other servers
// too where they may lead there; ignored are the links that cannot be followed, with
// the reason.
func candidates(of est.URI, links []est.Link, anywhere bool) (candidates map[est.Operation][]resource, ignored []string) {
	candidates = map[est.Operation][]resource{}
	var others []string
	for _, link := range links {
		types := link.Words("rt")
		offered := slices.DeleteFunc(slices.Clone(operations), func(o est.Operation) bool { return !slices.Contains(types, o.ResourceType()) })
		if len(offered) == 0 {
			continue
		}
		uri, err := resolve(of, link)
		if other := authority(uri); err == nil && other != authority(of) && !slices.Contains(others, other) {
			if others = append(others, other); !anywhere {
				err = errors.New("another host or port")
			} else if len(others) > maxServers {
				err = fmt.Errorf("more than %d other servers", maxServers)
			}
			if err != nil {
				others = others[:len(others)-1]
			}
		}
		if err != nil {
			ignored = append(ignored, fmt.Sprintf("%.*q (%v)", maxShown, link.Target, err))
			continue
		}
		for _, operation := range offered {
			if !slices.ContainsFunc(candidates[operation], func(r resource) bool { return r.uri == uri }) {
				candidates[operation] = append(candidates[operation], resource{uri: uri, accept: acceptOf(link, operation)})
			}
		}
	}
	return candidates, ignored
}

// resolve returns the URI of a link's target. A relative one is resolved against the
// server's root: the context is "an empty path" (RFC 6690 §2.1). What is not secured as
// this session is, coap:// above all, is no target: who can answer in the clear could lead
// the device away from its server.
func resolve(at est.URI, link est.Link) (est.URI, error) {
	none := est.URI{}
	if link.Has("anchor") {
		return none, errors.New("it is about another resource") // RFC 6690 §2.1
	}
	reference, err := url.Parse(link.Target)
	if err != nil || reference.Opaque != "" || len(link.Target) > maxTarget {
		return none, errors.New("not a URI reference")
	}
	target := (&url.URL{Scheme: est.SchemeCoAPs, Host: at.Address(), Path: "/"}).ResolveReference(reference)
	switch {
	case target.Scheme != est.SchemeCoAPs:
		return none, errors.New("another scheme than " + est.SchemeCoAPs)
	case target.User != nil:
		return none, errors.New("it names a user")
	case target.RawQuery != "" || target.ForceQuery || target.Fragment != "":
		return none, errors.New("it has a query or a fragment")
	case target.RawPath != "" || !est.ValidPath(target.Path):
		return none, errors.New("its path is not one of ours")
	}
	uri, err := est.ParseURI((&url.URL{Scheme: target.Scheme, Host: target.Host}).String())
	if err != nil {
		return none, err
	}
	if authority(uri) == authority(at) {
		uri = at // as the operator writes it
	}
	uri.Root = target.Path
	return uri, nil
}

// authority is a server's host and port, the same for all ways to write them.
func authority(u est.URI) string {
	host := strings.ToLower(u.Host)
	if address, err := netip.ParseAddr(host); err == nil {
		host = address.String()
	}
	return net.JoinHostPort(host, strconv.Itoa(int(u.Port)))
}

// acceptOf chooses the format to ask for: the usual one, unless the link says that
// only another is there (RFC 9148 §4.3).
func acceptOf(link est.Link, operation est.Operation) est.ContentFormat {
	possible := formats(operation)
	for _, format := range possible {
		if slices.Contains(link.Words("ct"), strconv.Itoa(int(format))) {
			return format
		}
	}
	return possible[0]
}

// pick takes the one resource that is meant: one with the label in its path, or,
// without a label, the one that all others are below, as those of labels are. What is
// on the server that was asked stands before what is on another one.
func pick(at est.URI, from []resource, label est.Label) (resource, error) {
	from = slices.Clone(from)
	if label != "" {
		from = slices.DeleteFunc(from, func(r resource) bool {
			segments := strings.Split(r.uri.Root, "/")
			return !slices.Contains(segments[:len(segments)-1], string(label))
		})
	}
	elsewhere := func(r resource) bool { return authority(r.uri) != authority(at) }
	if here := slices.DeleteFunc(slices.Clone(from), elsewhere); len(here) > 0 {
		from = here
	}
	if len(from) == 0 {
		if label != "" {
			return resource{}, fmt.Errorf("no link with the label %q", label)
		}
		return resource{}, errors.New("no link")
	}
	for _, r := range from {
		above := func(other resource) bool {
			return other == r || authority(other.uri) == authority(r.uri) &&
				other.directory() != r.directory() && strings.HasPrefix(other.directory(), r.directory())
		}
		if !slices.ContainsFunc(from, func(other resource) bool { return !above(other) }) {
			return r, nil
		}
	}
	return resource{}, fmt.Errorf("%d links, and which is meant only a label can tell", len(from))
}

func (r resource) directory() string { return r.uri.Root[:strings.LastIndex(r.uri.Root, "/")+1] }
