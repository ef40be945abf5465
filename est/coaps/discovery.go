package coaps

import (
	"context"
	"errors"
	"fmt"
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
	// defaultPort of a link without one (RFC 7252 §6.2).
	defaultPort = 5684
)

// resource is where a server has an operation, and what it answers with.
type resource struct {
	path   string
	accept est.ContentFormat
}

// required are those that "MUST be returned if the server supports resource
// discovery" (RFC 9148 §4.1); others are listed where they are.
var (
	required   = []est.Operation{est.CACerts, est.SimpleEnroll, est.SimpleReenroll}
	operations = append(slices.Clone(required), est.CSRAttrs, est.ServerKeyGen, est.ServerKeyGenCert)
)

// discover asks the server where its EST resources are (RFC 9148 §4.1, RFC 6690
// §4.1). What it answers are paths on this same, authenticated session: a link to
// anywhere else is not followed. What it does not answer stays below the URI's
// root, which "every server supports", with a warning. The error is one of the
// connection or of the context, with which the session is of no use.
func (s *Session) discover(ctx context.Context, label est.Label, warn func(string, ...any)) error {
	at := s.uri
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
	offered, ignored := candidates(s.uri, links)
	if len(ignored) > maxIgnored {
		ignored = append(ignored[:maxIgnored], fmt.Sprintf("%d more", len(ignored)-maxIgnored))
	}
	if len(ignored) > 0 {
		warn("discovery at %s: not followed: %s", at, strings.Join(ignored, ", "))
	}
	s.resources = map[est.Operation]resource{}
	var missing []string
	for _, operation := range operations {
		if len(offered[operation]) == 0 && !slices.Contains(required, operation) {
			s.absent = append(s.absent, operation)
			continue
		}
		found, err := pick(offered[operation], label)
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

// candidates are the resources that links offer for each operation; ignored are
// the links that cannot be followed, with the reason.
func candidates(of est.URI, links []est.Link) (candidates map[est.Operation][]resource, ignored []string) {
	candidates = map[est.Operation][]resource{}
	for _, link := range links {
		types := link.Words("rt")
		offered := slices.DeleteFunc(slices.Clone(operations), func(o est.Operation) bool { return !slices.Contains(types, o.ResourceType()) })
		if len(offered) == 0 {
			continue
		}
		path, err := resolve(of, link)
		if err != nil {
			ignored = append(ignored, fmt.Sprintf("%.*q (%v)", maxShown, link.Target, err))
			continue
		}
		for _, operation := range offered {
			if !slices.ContainsFunc(candidates[operation], func(r resource) bool { return r.path == path }) {
				candidates[operation] = append(candidates[operation], resource{path: path, accept: acceptOf(link, operation)})
			}
		}
	}
	return candidates, ignored
}

// resolve returns the path of a link's target on this server. A relative one is
// resolved against the server's root: the context is "an empty path" (RFC 6690 §2.1).
func resolve(at est.URI, link est.Link) (string, error) {
	if link.Has("anchor") {
		return "", errors.New("it is about another resource") // RFC 6690 §2.1
	}
	reference, err := url.Parse(link.Target)
	if err != nil || reference.Opaque != "" || len(link.Target) > maxTarget {
		return "", errors.New("not a URI reference")
	}
	target := (&url.URL{Scheme: est.SchemeCoAPs, Host: at.Address(), Path: "/"}).ResolveReference(reference)
	port := target.Port()
	if port == "" {
		port = strconv.Itoa(defaultPort)
	}
	switch {
	case target.Scheme != est.SchemeCoAPs:
		return "", errors.New("another scheme")
	case target.User != nil || !strings.EqualFold(target.Hostname(), at.Host) || port != strconv.Itoa(int(at.Port)):
		return "", errors.New("another host or port")
	case target.RawQuery != "" || target.ForceQuery || target.Fragment != "":
		return "", errors.New("it has a query or a fragment")
	case target.RawPath != "" || !est.ValidPath(target.Path):
		return "", errors.New("its path is not one of ours")
	}
	return target.Path, nil
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
// without a label, the one that all others are below, as those of labels are.
func pick(from []resource, label est.Label) (resource, error) {
	if label != "" {
		from = slices.DeleteFunc(slices.Clone(from), func(r resource) bool {
			segments := strings.Split(r.path, "/")
			return !slices.Contains(segments[:len(segments)-1], string(label))
		})
	}
	if len(from) == 0 {
		if label != "" {
			return resource{}, fmt.Errorf("no link with the label %q", label)
		}
		return resource{}, errors.New("no link")
	}
	for _, r := range from {
		above := func(other resource) bool {
			return other == r || other.directory() != r.directory() && strings.HasPrefix(other.directory(), r.directory())
		}
		if !slices.ContainsFunc(from, func(other resource) bool { return !above(other) }) {
			return r, nil
		}
	}
	return resource{}, fmt.Errorf("%d links, and which is meant only a label can tell", len(from))
}

func (r resource) directory() string { return r.path[:strings.LastIndex(r.path, "/")+1] }
