package estenroll_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"estenroll"
	"estenroll/testserver"
)

// A state directory of version 1 is that of the credential whose Security
// instance it keeps; the renewal saves it as version 2.
func TestStateOfVersion1(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "veteran")
	d.mustEnroll()
	d.ofVersion1()
	d.mustRenew()
	d.tidy(2)
	if journal := d.read("journal.json"); !strings.Contains(journal, `"version": 2`) || strings.Contains(journal, "recruit") {
		t.Errorf("journal %s", journal)
	}
}

// ofVersion1 writes the journal as version 1 would have, which knows no names, and
// has the configuration name another credential first.
func (d *device) ofVersion1() {
	d.t.Helper()
	var file map[string]any
	if err := json.Unmarshal([]byte(d.read("journal.json")), &file); err != nil {
		d.t.Fatal(err)
	}
	record := file["credentials"].(map[string]any)["veteran"].(map[string]any)
	file["version"], file["credentials"], file["last_attempt"] = 1, record["pairs"], record["last_attempt"]
	if operation, ok := record["operation"].(map[string]any); ok {
		delete(operation, "key_type")
		operation["wanted"] = "iFprjoCePBuc0K7vRLOYh1/8LZWZEQRmKGVLyJGit80="
		file["operation"] = operation
	}
	old, err := json.Marshal(file)
	if err != nil {
		d.t.Fatal(err)
	}
	d.write("journal.json", string(old))
	other := d.cfg.CredentialConfig
	other.Name, other.Security.Instance = "recruit", 1
	d.others = []estenroll.CredentialConfig{other}
}

// A first boot that waits in a state directory of version 1 is that of the
// credential that has a Security instance, and sends the same CSR again.
func TestPendingOfVersion1(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "veteran")
	d.site.deferring(t, 1, time.Second)
	_, err := d.enroll()
	d.wantPending(err)
	first := d.csrs()
	d.ofVersion1()
	d.now = func() time.Time { return time.Now().Add(time.Minute) }
	if result := d.mustEnroll(); !result.Recovered {
		t.Errorf("result %+v", result)
	}
	if again := d.csrs(); len(first) != 1 || !slices.Equal(first, again) {
		t.Errorf("%d and %d requests, or other bytes", len(first), len(again))
	}
	d.tidy(1)
}

// A name that takes the Security instance of another one is refused.
func TestInstanceOfAnother(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "first")
	d.mustEnroll()
	before := d.snapshot()
	d.name, d.cfg.Name = "renamed", "renamed"
	_, err := d.enroll()
	wantError(t, err, estenroll.ErrConfig)
	_, err = d.renew()
	wantError(t, err, estenroll.ErrConfig)
	if problem := d.status().Problem; !strings.Contains(problem, `is that of credential "first"`) {
		t.Errorf("problem %q", problem)
	}
	d.unchangedSince(before)
}

func TestCredentialsRefused(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "device")
	for name, c := range map[string]struct {
		names []string
		why   string
	}{
		"none":          {nil, "0 credentials"},
		"no name":       {[]string{""}, "want a name"},
		"a path":        {[]string{"../device"}, "want a name"},
		"too long":      {[]string{strings.Repeat("m", 65)}, "want a name"},
		"one name":      {[]string{"mqtt", "mqtt"}, "one name"},
		"but for case":  {[]string{"mqtt", "MQTT"}, "one name"},
		"one instance":  {[]string{"mqtt", "lwm2m"}, "both have security instance 0"},
		"more than can": {strings.Split(strings.Repeat("mqtt ", 16)+"mqtt", " "), "17 credentials"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := d.cfg.Config
			for i, name := range c.names {
				one := d.cfg.CredentialConfig
				one.Name = name
				if c.why == "one name" {
					one.Security.Instance = uint16(i)
				}
				cfg.Credentials = append(cfg.Credentials, one)
			}
			_, err := estenroll.Open(t.Context(), cfg)
			wantError(t, err, estenroll.ErrConfig)
			if err != nil && !strings.Contains(err.Error(), c.why) {
				t.Errorf("error %v, want %q", err, c.why)
			}
		})
	}
}

// Two credentials share the directory, the token and the chain certificate, and
// nothing else; one that the configuration has no more keeps what it has.
func TestSeveral(t *testing.T) {
	site := newSite(t, testserver.Config{})
	d := site.device(t, "lwm2m")
	mqtt := d.cfg.CredentialConfig
	mqtt.Name, mqtt.Security.Instance, mqtt.Request.RawSubject = "mqtt", 1, subject(t, "CN=mqtt")
	d.others = []estenroll.CredentialConfig{mqtt}
	all := func(do func(*estenroll.Credential) error) {
		t.Helper()
		device, err := estenroll.Open(t.Context(), d.cfg.config(d.others...))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range device.Credentials() {
			if err := do(c); err != nil {
				t.Errorf("%s: %v", c.Name(), err)
			}
		}
		if err := device.Close(); err != nil {
			t.Error(err)
		}
	}
	all(func(c *estenroll.Credential) error { _, err := c.Enroll(t.Context()); return err })
	for range 3 {
		all(func(c *estenroll.Credential) error { _, err := c.Renew(t.Context()); return err })
	}
	// A key, its two certificates each, and one chain certificate for both.
	if objects := d.objects(); len(objects) != 2*(2+2)+1 {
		t.Errorf("objects:\n%s", strings.Join(objects, "\n"))
	}
	if files := d.files(); len(files) != 4 {
		t.Errorf("files %q", files)
	}

	d.others = nil
	before := len(d.objects())
	d.mustRenew()
	if objects := d.objects(); len(objects) != before {
		t.Errorf("objects:\n%s", strings.Join(objects, "\n"))
	}
	if files := d.files(); len(files) != 4 {
		t.Errorf("files %q", files)
	}
	all(func(c *estenroll.Credential) error {
		if c.Configured() {
			return nil
		}
		_, err := c.Renew(t.Context())
		wantError(t, err, estenroll.ErrNotConfigured)
		_, err = c.Recover(t.Context())
		wantError(t, err, estenroll.ErrNotConfigured)
		status, err := c.Status(t.Context())
		if err == nil && (status.Name != "mqtt" || !status.Enrolled || status.Current == nil || status.Current.Problem != "" || !strings.Contains(status.Problem, "not in the configuration")) {
			t.Errorf("status %+v", status)
		}
		return err
	})
	d.others = []estenroll.CredentialConfig{mqtt}
	all(func(c *estenroll.Credential) error { _, err := c.Renew(t.Context()); return err })
}

// A credential that is given another Security instance leaves none behind that would
// point at what is retired, or stand in another credential's way.
func TestInstanceMoved(t *testing.T) {
	d := newSite(t, testserver.Config{}).device(t, "moved")
	d.mustEnroll()
	d.cfg.Security.Instance = 5
	d.mustRenew()
	if security := d.read("security.json"); strings.Contains(security, `"id": 0`) || !strings.Contains(security, `"id": 5`) {
		t.Errorf("Security object %s", security)
	}
	d.tidy(2)
	heir := d.cfg.CredentialConfig
	heir.Name, heir.Security.Instance, heir.Request.RawSubject = "heir", 0, subject(t, "CN=heir")
	d.others, d.name = []estenroll.CredentialConfig{heir}, "heir"
	d.mustEnroll()
}
