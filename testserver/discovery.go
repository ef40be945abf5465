package testserver

import (
	"fmt"
	"slices"
	"strings"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"estenroll/est"
	"estenroll/internal/coap"
)

const (
	// corePath is where a server lists its resources (RFC 6690 §4).
	corePath = "/.well-known/core"
	// formatLinks is the Content-Format application/link-format (RFC 7252 §12.3).
	formatLinks = 40
	// oddRoot is a second EST root: only a client that discovers it finds it.
	oddRoot = "/e/plz"
)

// operations are the resources below an EST root, in the order of their links.
var operations = []est.Operation{est.CACerts, est.SimpleEnroll, est.SimpleReenroll, est.CSRAttrs, est.ServerKeyGen, est.ServerKeyGenCert}

// operations are those of the server's.
func (s *Server) operations() []est.Operation {
	return slices.DeleteFunc(slices.Clone(operations), func(o est.Operation) bool {
		return o == est.CSRAttrs && s.cfg.CSRAttributes == nil || generates(o) && !s.cfg.ServerKeyGen
	})
}

// generates reports the operations in which the server makes the key.
func generates(o est.Operation) bool { return o == est.ServerKeyGen || o == est.ServerKeyGenCert }

// roots are the paths that the resources of a door are below: the one that every
// server has and the odd one, which the second door has if there is one, and each of
// them with each label (RFC 9148 §4.1).
func (s *Server) roots(linked bool) []string {
	switch {
	case linked:
		return s.labelled(oddRoot)
	case s.linked != nil:
		return s.labelled(est.DefaultRoot)
	}
	return slices.Concat(s.labelled(est.DefaultRoot), s.labelled(oddRoot))
}

func (s *Server) labelled(root string) []string {
	roots := []string{root}
	for _, label := range s.cfg.Labels {
		roots = append(roots, root+"/"+label)
	}
	return roots
}

// operationAt finds what a path of a door is for.
func (s *Server) operationAt(path string, linked bool) (operation est.Operation, found bool) {
	for _, operation := range s.operations() {
		root, named := strings.CutSuffix(path, "/"+operation.ShortPath())
		if named && slices.Contains(s.roots(linked), root) {
			return operation, true
		}
	}
	return "", false
}

// checkLabel: RFC 7030 §3.2.2, a label is one segment of a path and no
// operation's; over CoAP (RFC 9148 §4.1) not its short name either.
func checkLabel(label string) error {
	isOperation := slices.ContainsFunc(operations, func(o est.Operation) bool { return label == string(o) || label == o.ShortPath() })
	if label == "" || strings.ContainsFunc(label, notUnreserved) || isOperation {
		return fmt.Errorf("label %q: not a path segment of letters, digits and -._~ that is no operation", label)
	}
	return nil
}

// notUnreserved: RFC 3986 §2.3. Other characters would need an encoding that
// differs between a URI and the Uri-Path option.
func notUnreserved(r rune) bool {
	switch {
	case '0' <= r && r <= '9', 'A' <= r && r <= 'Z', 'a' <= r && r <= 'z', strings.ContainsRune("-._~", r):
		return false
	}
	return true
}

// link is a resource of the server's (RFC 6690 §2).
type link struct {
	target, resourceType string
	formats              []string
}

func (l link) String() string {
	formats := strings.Join(l.formats, " ")
	if len(l.formats) > 1 { // RFC 7252 §7.2.1: several are in quotation marks
		formats = `"` + formats + `"`
	}
	return fmt.Sprintf(`<%s>;rt="%s";ct=%s`, l.target, l.resourceType, formats)
}

// links are the odd resources, those without a label first.
func (s *Server) links() []link {
	var links []link
	for _, root := range s.labelled(oddRoot) {
		for _, operation := range s.operations() {
			links = append(links, link{s.LinkedURI() + root + "/" + operation.ShortPath(), operation.ResourceType(), s.formats(operation)})
		}
	}
	return links
}

// formats are those of an operation's answer.
func (s *Server) formats(operation est.Operation) []string {
	answer := s.answered(nil)
	switch operation {
	case est.ServerKeyGen, est.ServerKeyGenCert:
		return []string{fmt.Sprint(est.ContentFormatMultipartCore)}
	case est.CSRAttrs:
		return []string{fmt.Sprint(est.ContentFormatCSRAttrs)}
	case est.CACerts:
		answer = s.ca.Load().caCerts()
	}
	formats := []string{fmt.Sprint(est.ContentFormatPKCS7CertsOnly)}
	if len(answer) == 1 {
		formats = append(formats, fmt.Sprint(est.ContentFormatPKIXCert))
	}
	return formats
}

// discover answers GET /.well-known/core (RFC 6690 §4).
func (s *Server) discover(req *coap.Request) *coap.Response {
	faults := s.Faults()
	switch {
	case req.Method != codes.GET:
		return diagnostic(codes.MethodNotAllowed, "discovery is GET")
	case req.Accept != nil && *req.Accept != formatLinks:
		return diagnostic(codes.NotAcceptable, "offered is 40")
	case faults.NoDiscovery:
		return diagnostic(codes.NotFound, "no such resource")
	case faults.Links != "":
		return &coap.Response{Code: codes.Content, ContentFormat: new(uint16(formatLinks)), Body: []byte(faults.Links)}
	}
	var matching []string
	for _, link := range s.links() {
		// RFC 6690 §4.1 knows one filter; with several a link has to match all.
		if !slices.ContainsFunc(req.Query, func(filter string) bool { return !link.matches(filter) }) {
			matching = append(matching, link.String())
		}
	}
	return &coap.Response{Code: codes.Content, ContentFormat: new(uint16(formatLinks)), Body: []byte(strings.Join(matching, ","))}
}

// matches applies a filter, name=pattern: a trailing * matches any rest, and one
// of several values is enough (RFC 6690 §4.1).
func (l link) matches(filter string) bool {
	name, pattern, _ := strings.Cut(filter, "=")
	values := map[string][]string{"href": {l.target}, "rt": {l.resourceType}, "ct": l.formats}[name]
	prefix, wild := strings.CutSuffix(pattern, "*")
	return slices.ContainsFunc(values, func(value string) bool {
		return value == pattern || wild && strings.HasPrefix(value, prefix)
	})
}
