package coaps

import "estenroll/est"

// AlertMeaning is alertMeaning, for the alerts that no server here sends at will.
var AlertMeaning = alertMeaning

// Candidates are the paths that discovery would take, and what it ignores.
func Candidates(u URI, links []est.Link) (paths, ignored []string) {
	candidates, ignored := u.candidates(links)
	for _, resources := range candidates {
		for _, r := range resources {
			paths = append(paths, r.path)
		}
	}
	return paths, ignored
}
