package coaps

import "estenroll/est"

// Candidates are the resources that discovery would take, and what it ignores.
func Candidates(of est.URI, links []est.Link) (uris []est.URI, ignored []string) {
	offered, ignored := candidates(of, links, true)
	for _, resources := range offered {
		for _, r := range resources {
			uris = append(uris, r.uri)
		}
	}
	return uris, ignored
}
