package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"estenroll/packaging/guide"
	"estenroll/testserver"
)

const guideDocument = "../../testserver/README.md"

// sourceDir is the directory of the tests: a script has another one.
var sourceDir = func() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	return dir
}()

// portsOf is the key of a script's map from the addresses of the guide to those of its servers.
type portsOf struct{}

// guideText is a block of the guide, with the ports of the script's servers.
func guideText(ts *testscript.TestScript, args []string) guide.Block {
	blocks, err := guide.Blocks(filepath.Join(sourceDir, guideDocument))
	ts.Check(err)
	if len(args) != 1 || blocks[args[0]].Text == "" {
		ts.Fatalf("want the name of a block of testserver/README.md, not %q", args)
	}
	block := blocks[args[0]]
	for there, here := range ts.Value(portsOf{}).(map[string]string) {
		block.Text = strings.ReplaceAll(block.Text, there, here)
	}
	return block
}

// guideStart starts the server of a block, on ports that are free.
//
//	guide NAME
func guideStart(ts *testscript.TestScript, _ bool, args []string) {
	words := strings.Fields(strings.ReplaceAll(guideText(ts, args).Text, "\\\n", " "))
	if len(words) < 3 || words[0] != "est-testserver" || words[1] != "serve" || words[len(words)-1] != "&" {
		ts.Fatalf("block %s starts no server", args[0])
	}
	words = words[2 : len(words)-1]
	there := map[string]string{}
	for i := range words[1:] {
		if strings.HasPrefix(words[i], "--listen") {
			there[words[i]], words[i+1] = words[i+1], "127.0.0.1:0"
		}
	}
	serve(ts, false, append([]string{"INT"}, words...))
	ports := ts.Value(portsOf{}).(map[string]string)
	ports[there["--listen"]] = strings.TrimPrefix(ts.Getenv("URI"), "coaps://")
	ports[there["--listen-https"]] = strings.TrimPrefix(ts.Getenv("HTTPS_URI"), "https://")
}

// guideBlock runs a block of the guide, or writes one that is a file.
//
//	block NAME
func guideBlock(ts *testscript.TestScript, neg bool, args []string) {
	block := guideText(ts, args)
	if block.Language != "sh" {
		ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(block.Text), 0o600))
		return
	}
	if err := ts.Exec("sh", "-euc", block.Text); err != nil || neg {
		ts.Fatalf("block %s: %v", args[0], err)
	}
}

// The story of the guide has each of its blocks, and its list of faults is the help's.
func TestGuide(t *testing.T) {
	t.Parallel()
	blocks, err := guide.Blocks(guideDocument)
	if err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile("testdata/guide.txt")
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range blocks {
		switch {
		case name == "faults":
			if block.Text != testserver.FaultsHelp+"\n" {
				t.Errorf("the faults of the guide are not those of the help:\n%s", testserver.FaultsHelp)
			}
		case name == "go.mod", name == "device_test.go": // testserver's TestInAnotherModule runs them
		case !strings.Contains(string(script), "\nblock "+name+"\n") && !strings.Contains(string(script), "\nguide "+name+"\n"):
			t.Errorf("guide.txt does not run block %s", name)
		}
	}
}
