package main

import (
	"time"

	"estenroll"
)

// parseInterval reads a duration, or 0 for none.
func parseInterval(text string) (time.Duration, error) {
	if text == "0" {
		return 0, nil
	}
	return estenroll.ParseMargin(text)
}
