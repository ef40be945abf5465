// Package guide takes the examples out of a document, for the tests that run them.
// It is a tool of the tests: no shipped program contains it.
package guide

import (
	"fmt"
	"os"
	"regexp"
)

// Block is an example of a document.
type Block struct {
	Language, Text string
}

var block = regexp.MustCompile("(?ms)^```(\\S+) (\\S+)\n(.*?)^```$")

// Blocks returns the blocks of a Markdown file whose fence gives them a name after
// their language, by that name: at least one, and no name twice.
func Blocks(path string) (map[string]Block, error) {
	document, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	blocks := map[string]Block{}
	for _, match := range block.FindAllStringSubmatch(string(document), -1) {
		if _, twice := blocks[match[2]]; twice {
			return nil, fmt.Errorf("%s: two blocks are named %s", path, match[2])
		}
		blocks[match[2]] = Block{match[1], match[3]}
	}
	if len(blocks) == 0 {
		return nil, fmt.Errorf("%s: no block has a name", path)
	}
	return blocks, nil
}
