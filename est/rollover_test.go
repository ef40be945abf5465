package est_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"estenroll/est"
)

// between sets when a certificate is valid, in hours from the epoch.
func between(from, to int) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		asCA(c)
		c.NotBefore, c.NotAfter = epoch.Add(time.Duration(from)*time.Hour), epoch.Add(time.Duration(to)*time.Hour)
	}
}

// root makes a root CA of a name that others may have too.
func root(t *testing.T, name string, change func(*x509.Certificate)) *authority {
	t.Helper()
	key := newKey(t)
	return &authority{cert: issue(t, nil, name, key, change), key: key}
}

// What of a cacerts answer becomes an anchor, by the anchors that are held.
func TestSucceed(t *testing.T) {
	const name = "root"
	old, second, third := root(t, name, asCA), root(t, name, asCA), root(t, name, asCA)
	stranger, renamed := root(t, name, asCA), root(t, "another root", asCA)
	link := func(by, to *authority, change func(*x509.Certificate)) *x509.Certificate {
		return issue(t, by, to.cert.Subject.CommonName, to.key, change)
	}
	secondWithOld, oldWithSecond, thirdWithSecond := link(old, second, asCA), link(second, old, asCA), link(second, third, asCA)
	issuing := newCA(t, old, "issuing")
	ended, ending := root(t, name, between(-90, -10)), root(t, name, between(-5, 5))
	endedWithOld := link(old, ended, asCA)
	future := root(t, name, between(1, 9))
	short := root(t, name, func(c *x509.Certificate) { asCA(c); c.MaxPathLen = 1 })
	sub := newCA(t, old, "sub")
	extended := func(c *x509.Certificate) {
		asCA(c)
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
	}
	oldLeaf, newLeaf := issue(t, old, "server", newKey(t), nil), issue(t, second, "server", newKey(t), nil)
	// It claims the name and the key of the held root, and nobody has signed that.
	clients := func(c *x509.Certificate) { asCA(c); c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }
	sooner := issue(t, nil, name, old.key, between(-90, -10)) // the held root once more
	forged := issue(t, root(t, "nobody", asCA), name, old.key, between(-1, 900))

	for _, c := range []struct {
		name       string
		held       []*x509.Certificate
		published  []*x509.Certificate
		vouched    []est.Fingerprint
		needed     []*x509.Certificate
		anchors    []*x509.Certificate
		refused    int
		err        error
		alsoBelow  []*x509.Certificate // beside the anchors
		notAnchors bool
	}{
		{name: "as it was", published: certs(old.cert, issuing.cert), anchors: certs(old.cert), alsoBelow: certs(issuing.cert)},
		{name: "announced", published: certs(old.cert, oldWithSecond, secondWithOld, second.cert), anchors: certs(old.cert, second.cert), alsoBelow: certs(oldWithSecond, secondWithOld)},
		{name: "finished", published: certs(secondWithOld, second.cert), anchors: certs(second.cert)},
		{name: "finished, the old one needed", published: certs(secondWithOld, second.cert), needed: certs(oldLeaf), anchors: certs(second.cert, old.cert), alsoBelow: certs(secondWithOld)},
		{name: "finished, the old one not needed", published: certs(secondWithOld, second.cert), needed: certs(newLeaf), anchors: certs(second.cert)},
		{name: "the old one's are led to by OldWithNew", published: certs(secondWithOld, oldWithSecond, second.cert), needed: certs(oldLeaf), anchors: certs(second.cert), alsoBelow: certs(oldWithSecond, secondWithOld)},
		{name: "two changes slept through", published: certs(thirdWithSecond, third.cert, secondWithOld), anchors: certs(third.cert)},
		{name: "two changes, all published", published: certs(third.cert, thirdWithSecond, second.cert, secondWithOld), anchors: certs(third.cert, second.cert), alsoBelow: certs(thirdWithSecond)},
		{name: "two changes, a link missing", published: certs(thirdWithSecond, third.cert), err: est.ErrNotVouched},
		{name: "another name", published: certs(renamed.cert, link(old, renamed, asCA)), anchors: certs(renamed.cert)},
		{name: "no link", published: certs(second.cert), err: est.ErrNotVouched},
		{name: "no link, beside the old one", published: certs(old.cert, second.cert), anchors: certs(old.cert), refused: 1},
		{name: "OldWithNew alone is no voucher", published: certs(oldWithSecond, second.cert), err: est.ErrNotVouched},
		{name: "a link of a stranger of the same name", published: certs(second.cert, link(stranger, second, asCA)), err: est.ErrNotVouched},
		{name: "a link to another key of the same name", published: certs(stranger.cert, secondWithOld), err: est.ErrNotVouched},
		{name: "a link to the key under another name", published: certs(renamed.cert, issue(t, old, "root", renamed.key, asCA)), err: est.ErrNotVouched},
		{name: "a link that is no CA's", published: certs(second.cert, link(old, second, nil)), err: est.ErrNotTrusted},
		{name: "a link with a name constraint", published: certs(second.cert, link(old, second, func(c *x509.Certificate) { asCA(c); c.PermittedDNSDomains = []string{"example"} })), err: est.ErrNotVouched},
		{name: "a link with a shorter path", published: certs(second.cert, link(old, second, func(c *x509.Certificate) { asCA(c); c.MaxPathLenZero = true })), err: est.ErrNotVouched},
		{name: "a link with the root's own path", published: certs(short.cert, link(old, short, func(c *x509.Certificate) { asCA(c); c.MaxPathLen = 1 })), anchors: certs(short.cert)},
		{name: "a link with an unknown critical extension", published: certs(second.cert, link(old, second, extended)), err: est.ErrNotVouched},
		{name: "a link for one use", published: certs(second.cert, link(old, second, clients)), err: est.ErrNotVouched},
		{name: "one twice", published: certs(old.cert, second.cert, old.cert, secondWithOld, second.cert), anchors: certs(old.cert, second.cert), alsoBelow: certs(secondWithOld)},
		{name: "the held key with an end that is past", published: certs(sooner), anchors: certs(old.cert)},
		{name: "the held key with both ends", published: certs(sooner, old.cert), anchors: certs(old.cert)},
		{name: "a link that has not begun", published: certs(second.cert, link(old, second, between(1, 9))), err: est.ErrNotVouched},
		{name: "a link that has ended", published: certs(second.cert, link(old, second, between(-9, -8))), anchors: certs(second.cert)},
		{name: "an old root that has ended, and its link with it", held: certs(ended.cert), published: certs(second.cert, link(ended, second, between(-90, -10))), anchors: certs(second.cert)},
		{name: "a new root that has ended", published: certs(ended.cert, endedWithOld), err: est.ErrNotVouched},
		{name: "a new root that has ended, beside the old one", published: certs(old.cert, ended.cert, endedWithOld), anchors: certs(old.cert), refused: 1, alsoBelow: certs(endedWithOld)},
		{name: "a new root that has not begun", published: certs(future.cert, link(old, future, asCA)), err: est.ErrNotVouched},
		{name: "the held key with a new end", held: certs(ended.cert), published: certs(issue(t, nil, name, ended.key, asCA)), notAnchors: true},
		{name: "a CA below the old root vouches for nobody", published: certs(second.cert, sub.cert, issue(t, sub, name, second.key, asCA)), err: est.ErrNotVouched},
		{name: "the operator", published: certs(second.cert, stranger.cert), vouched: []est.Fingerprint{est.FingerprintOf(second.cert)}, anchors: certs(second.cert), refused: 1},
		{name: "the operator, of a root that vouches on", published: certs(second.cert, thirdWithSecond, third.cert), vouched: []est.Fingerprint{est.FingerprintOf(second.cert)}, anchors: certs(second.cert, third.cert), alsoBelow: certs(thirdWithSecond)},
		{name: "the operator, of a root that has ended", published: certs(ended.cert), vouched: []est.Fingerprint{est.FingerprintOf(ended.cert)}, err: est.ErrNotVouched},
		{name: "a forged likeness of the held root", published: certs(forged), anchors: certs(old.cert)},
		{name: "a link without its root", published: certs(secondWithOld), needed: certs(newLeaf, secondWithOld), anchors: certs(old.cert), alsoBelow: certs(secondWithOld)},
		{name: "a subordinate root", held: certs(sub.cert), published: certs(sub.cert), anchors: certs(sub.cert)},
		{name: "nothing is needed that is not there", held: certs(old.cert, ending.cert), published: certs(old.cert), anchors: certs(old.cert)},
		{name: "a leaf", published: certs(old.cert, oldLeaf), err: est.ErrNotTrusted},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.held == nil {
				c.held = certs(old.cert)
			}
			held := anchors(t, c.held...)
			s, err := held.Succeed(c.published, c.vouched, epoch, c.needed)
			if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
				t.Fatalf("got %+v, %v, want %v", s, err, c.err)
			}
			if err != nil {
				return
			}
			if c.notAnchors { // but a certificate of theirs
				c.anchors = c.published
			}
			if got := s.Anchors.Anchors(); !sameSet(got, c.anchors) {
				t.Errorf("anchors: got %s, want %s", ids(got), ids(c.anchors))
			}
			if len(s.Refused) != c.refused {
				t.Errorf("refused: %s, want %d", ids(s.Refused), c.refused)
			}
			if got, want := s.Anchors.Certificates(), append(certs(c.anchors...), c.alsoBelow...); !sameSet(got, want) {
				t.Errorf("all: got %s, want %s", ids(got), ids(want))
			}
			// What is written down and read again is the same.
			if again := anchors(t, s.Anchors.Certificates()...).Anchors(); !sameSet(again, c.anchors) {
				t.Errorf("read again: got %s, want %s", ids(again), ids(c.anchors))
			}
			for _, kept := range s.Kept {
				if !sameSet(certs(kept), certs(old.cert)) {
					t.Errorf("kept %s", ids(s.Kept))
				}
			}
		})
	}
}

func certs(list ...*x509.Certificate) []*x509.Certificate {
	return append([]*x509.Certificate{}, list...)
}

func ids(list []*x509.Certificate) string {
	var texts []string
	for _, cert := range list {
		texts = append(texts, cert.Subject.CommonName+" "+est.FingerprintOf(cert).String()[:8])
	}
	return strings.Join(texts, ", ")
}

func sameSet(a, b []*x509.Certificate) bool {
	in := map[est.Fingerprint]int{}
	for _, cert := range a {
		in[est.FingerprintOf(cert)]++
	}
	for _, cert := range b {
		in[est.FingerprintOf(cert)]--
	}
	for _, n := range in {
		if n != 0 {
			return false
		}
	}
	return true
}

// A chain that another anchor would judge is told from one that is wrong.
func TestNoAnchor(t *testing.T) {
	old, renewed := root(t, "root", asCA), root(t, "root", asCA)
	ended := root(t, "root", between(-90, -10))
	forServers := func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = []string{"ca.example"}, []net.IP{} }
	endedSub := newCA(t, old, "sub")
	endedSub.cert = issue(t, old, "sub", endedSub.key, between(-90, -10))
	for _, c := range []struct {
		name   string
		trust  *est.TrustAnchors
		leaf   *x509.Certificate
		server string
		want   bool
	}{
		{"another root of the same name", anchors(t, old.cert), issue(t, renewed, "server", newKey(t), forServers), "ca.example", true},
		{"the root has ended", anchors(t, ended.cert), issue(t, ended, "server", newKey(t), forServers), "ca.example", true},
		{"the CA between has ended", anchors(t, old.cert, endedSub.cert), issue(t, endedSub, "server", newKey(t), forServers), "ca.example", true},
		{"the leaf has ended", anchors(t, old.cert), issue(t, old, "server", newKey(t), func(c *x509.Certificate) { forServers(c); c.NotAfter = epoch.Add(-time.Minute) }), "ca.example", false},
		{"another name", anchors(t, old.cert), issue(t, old, "server", newKey(t), forServers), "other.example", false},
	} {
		err := c.trust.VerifyServer([]*x509.Certificate{c.leaf}, c.server, epoch)
		if !errors.Is(err, est.ErrServerCertificate) || errors.Is(err, est.ErrNoAnchor) != c.want {
			t.Errorf("%s: got %v", c.name, err)
		}
	}
}

func FuzzParseFingerprint(f *testing.F) {
	digits := strings.Repeat("0aF9", 16)
	f.Add(digits)
	f.Add("0A" + strings.Repeat(":fF", 31))
	f.Add(digits[:62])
	f.Add("0a:" + digits[2:])
	f.Fuzz(func(t *testing.T, text string) {
		print, err := est.ParseFingerprint(text)
		if err != nil {
			return
		}
		if again, err := est.ParseFingerprint(print.String()); err != nil || again != print {
			t.Errorf("%q: %s is not read again: %v", text, print, err)
		}
		if want := strings.ToLower(strings.ReplaceAll(text, ":", "")); print.String() != want || len(text) != 64 && len(text) != 95 {
			t.Errorf("%q: got %s", text, print)
		}
	})
}

// Without any anchor nobody is judged, and nothing but a fingerprint makes one.
func TestNoTrustAnchors(t *testing.T) {
	ca, other := root(t, "root", asCA), root(t, "root", asCA)
	server := []*x509.Certificate{issue(t, ca, "server", newKey(t), func(c *x509.Certificate) { c.DNSNames = []string{"est.example"} })}
	none := est.NoTrustAnchors()
	if err := none.VerifyServer(server, "est.example", epoch); !errors.Is(err, est.ErrNotTrusted) || !errors.Is(err, est.ErrNoAnchor) {
		t.Errorf("got %v", err)
	}
	published := []*x509.Certificate{ca.cert, other.cert}
	if _, err := none.Succeed(published, nil, epoch); !errors.Is(err, est.ErrNotVouched) {
		t.Errorf("without a fingerprint: got %v", err)
	}
	next, err := none.Succeed(published, []est.Fingerprint{est.FingerprintOf(ca.cert)}, epoch)
	if err != nil {
		t.Fatal(err)
	}
	if err := next.Anchors.VerifyServer(server, "est.example", epoch); err != nil || len(next.Anchors.Anchors()) != 1 {
		t.Errorf("got %v, %d anchors", err, len(next.Anchors.Anchors()))
	}
	if joined := none.Join(next.Anchors); joined.VerifyServer(server, "est.example", epoch) != nil {
		t.Error("joined with anchors it does not judge as they do")
	}
}
