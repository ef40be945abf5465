package nss_test

import (
	"strings"
	"testing"

	"estenroll/engine/enginetest/nss"
)

func TestToken(t *testing.T) {
	t.Parallel()
	token := nss.Build(t).New(t, "marker")
	if _, err := token.GenerateEC("name", "01"); err != nil {
		t.Fatal(err)
	}
	objects, err := token.Tool("--list-objects")
	if err != nil || !strings.Contains(objects, "Private Key Object; EC") {
		t.Errorf("%v\n%s", err, objects)
	}
	if err := token.Add("another"); err != nil {
		t.Fatal(err)
	}
	token.Label = "another"
	if objects, err := token.Tool("--list-objects"); err != nil || strings.Contains(objects, "Private") {
		t.Errorf("%v\n%s", err, objects)
	}
}
