package coaps

import "estenroll/est"

// Candidates are the paths that discovery would take, and what it ignores.
func Candidates(of est.URI, links []est.Link) (paths, ignored []string) {
	offered, ignored := candidates(of, links)
	for _, resources := range offered {
		for _, r := range resources {
			paths = append(paths, r.path)
		}
	}
	return paths, ignored
}
