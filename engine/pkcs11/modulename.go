//go:build cgo

package pkcs11

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"estenroll/engine"
	"estenroll/internal/durable"
)

// places are where modules are looked for by name.
type places struct {
	// configurations hold p11-kit's module configuration, one file "NAME.module" for
	// each module: what a file of an earlier directory says goes before what its
	// namesake in a later one does.
	// The user's own directory is none of them: what is loaded here must not depend on
	// a home.
	configurations []string
	// directories hold the modules that are configured without a path, and those
	// that are not configured.
	directories []string
}

// systemPlaces are those of p11-kit, which other programs of the field look in
// (pkcs11.conf(5)), and of the packages of modules.
func systemPlaces() places {
	p := places{configurations: []string{"/etc/pkcs11/modules", "/usr/share/p11-kit/modules"}}
	libraries := []string{"/usr/lib64", "/usr/lib", "/usr/local/lib"}
	if triplet := map[string]string{
		"386": "i386-linux-gnu", "amd64": "x86_64-linux-gnu", "arm": "arm-linux-gnueabihf", "arm64": "aarch64-linux-gnu", "riscv64": "riscv64-linux-gnu",
	}[runtime.GOARCH]; triplet != "" {
		libraries = append([]string{"/usr/lib/" + triplet}, libraries...)
	}
	for _, library := range libraries {
		p.directories = append(p.directories, library+"/pkcs11", library+"/softhsm", library)
	}
	return p
}

// findModule returns the path of the module that an address names: by module-path;
// by module-path as its directory and module-name; or by module-name alone, which
// is p11-kit's name of it, or that of its file without "lib" and ".so" (RFC 7512
// §2.4). "Only those modules found matching these query attributes" are used.
func (p places) findModule(u URI) (string, error) {
	if u.ModulePath == "" && u.ModuleName == "" {
		return "", fmt.Errorf("%w: module-path or module-name is missing", engine.ErrModuleNotFound)
	}
	if u.ModuleName == "" {
		return u.ModulePath, nil
	}
	if u.ModulePath != "" {
		info, err := os.Stat(u.ModulePath)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return "", fmt.Errorf("%w: %w", engine.ErrModuleNotFound, err)
		case err != nil:
			return "", fmt.Errorf("%w: %w", engine.ErrModule, err)
		case info.IsDir():
			return oneModule(u.ModuleName, []string{u.ModulePath})
		case !isNamed(u.ModulePath, u.ModuleName):
			return "", fmt.Errorf("%w: module-name and module-path are of different modules", engine.ErrModule)
		}
		return u.ModulePath, nil
	}
	path, err := p.configured(u.ModuleName)
	if err == nil && path == "" {
		path, err = oneModule(u.ModuleName, p.directories)
	}
	return path, err
}

// configured returns the path of the module that p11-kit has a name for; none is "".
func (p places) configured(name string) (string, error) {
	var files []string
	for _, directory := range p.configurations {
		for _, file := range names(directory) {
			base, isModule := strings.CutSuffix(file, ".module")
			if isModule && strings.EqualFold(base, name) && !slices.Contains(files, file) {
				files = append(files, file)
			}
		}
	}
	switch {
	case len(files) == 0:
		return "", nil
	case len(files) > 1: // names that differ in case
		return "", fmt.Errorf("%w: module-name means any of %s", engine.ErrModule, strings.Join(files, ", "))
	}
	module, err := p.configuration(files[0])
	if err != nil {
		return "", fmt.Errorf("%w: %w", engine.ErrModule, err)
	}
	if filepath.IsAbs(module) {
		return module, nil
	}
	for _, directory := range p.directories {
		if path := filepath.Join(directory, module); exists(path) {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: %s names %s, which is in none of %s", engine.ErrModuleNotFound, files[0], module, strings.Join(p.directories, ", "))
}

// configuration returns what the first file with a name says of its module.
func (p places) configuration(name string) (module string, err error) {
	for _, directory := range p.configurations {
		path := filepath.Join(directory, name)
		data, err := durable.ReadFile(path, maxModuleFile)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		if module, err = parseModuleFile(data); err != nil {
			return "", fmt.Errorf("%s: %w", path, err)
		}
		if module != "" {
			return module, nil
		}
	}
	return "", fmt.Errorf("%s: it names no module", name)
}

const maxModuleFile = 1 << 16 // bytes

// parseModuleFile reads the file of a module from p11-kit's configuration: lines
// "key: value", of which "module" is the file. A file may leave it to its namesake
// in another directory.
func parseModuleFile(data []byte) (string, error) {
	file := ""
	for line := range bytes.Lines(data) {
		key, value, found := bytes.Cut(line, []byte(":"))
		if found && string(bytes.TrimSpace(key)) == "module" {
			file = string(bytes.TrimSpace(value))
		}
	}
	if strings.ContainsFunc(file, func(r rune) bool { return r < ' ' || r == 0x7f }) || len(file) > maxPath {
		return "", errors.New("what it names is not the path of a module")
	}
	return file, nil
}

// oneModule returns the one module with a name. The same file under two paths is one.
func oneModule(name string, directories []string) (string, error) {
	var paths, files []string
	for _, directory := range directories {
		for _, file := range names(directory) {
			path := filepath.Join(directory, file)
			resolved, err := filepath.EvalSymlinks(path)
			if !isNamed(file, name) || err != nil || slices.Contains(files, resolved) {
				continue
			}
			paths, files = append(paths, path), append(files, resolved)
		}
	}
	switch len(paths) {
	case 0:
		return "", fmt.Errorf("%w: there is no %s.so nor lib%s.so in %s", engine.ErrModuleNotFound, name, name, strings.Join(directories, ", "))
	case 1:
		return paths[0], nil
	}
	return "", fmt.Errorf("%w: module-name means any of %s", engine.ErrModule, strings.Join(paths, ", "))
}

// names lists a directory, of which there may be none.
func names(directory string) []string {
	entries, err := os.ReadDir(directory)
	if err != nil {
		return nil
	}
	list := make([]string, len(entries))
	for i, entry := range entries {
		list[i] = entry.Name()
	}
	return list
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
