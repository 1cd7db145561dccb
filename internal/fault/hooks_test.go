package fault_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"idempotent-orders/internal/fault"
)

// A point that nobody reaches is a death that nobody tries, and a removal that removes nothing proves nothing.
func TestEachPointAndEachRemovalIsListedAndHookedIntoTheProgram(t *testing.T) {
	t.Parallel()
	names := constants(t, "fault.go")
	called := calls(t, filepath.Join("..", ".."))
	for _, entry := range []struct {
		kind, method string
		listed       []string
		elsewhere    []string
	}{
		{"Point", "Reached", texts(fault.Points()), nil},
		{"Removal", "Removed", texts(fault.Removals()), keysOfVar(t, "on.go", "changes")}, // by what is replaced in the SQL
	} {
		declared := names[entry.kind]
		if len(declared) == 0 {
			t.Fatalf("fault.go declares no %s", entry.kind)
		}
		for name, value := range declared {
			if !slices.Contains(entry.listed, value) {
				t.Errorf("fault.%s is not in the list of each %s", name, entry.kind)
			}
			if !called[name+"."+entry.method] && !slices.Contains(entry.elsewhere, name) {
				t.Errorf("nothing in the program calls fault.%s.%s()", name, entry.method)
			}
		}
		if len(entry.listed) != len(declared) {
			t.Errorf("%d of %s are listed, and %d declared", len(entry.listed), entry.kind, len(declared))
		}
	}
}

func texts[T ~string](all []T) (texts []string) {
	for _, one := range all {
		texts = append(texts, string(one))
	}
	return texts
}

func parse(t *testing.T, path string) *ast.File {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// constants returns the constants of a file: type to name to value.
func constants(t *testing.T, path string) map[string]map[string]string {
	t.Helper()
	all := map[string]map[string]string{}
	ast.Inspect(parse(t, path), func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Names) != 1 || len(spec.Values) != 1 {
			return true
		}
		kind, typed := spec.Type.(*ast.Ident)
		value, literal := spec.Values[0].(*ast.BasicLit)
		if !typed || !literal {
			return true
		}
		text, err := strconv.Unquote(value.Value)
		if err != nil {
			t.Fatal(err)
		}
		if all[kind.Name] == nil {
			all[kind.Name] = map[string]string{}
		}
		all[kind.Name][spec.Names[0].Name] = text
		return true
	})
	return all
}

// keysOfVar returns the keys, which are names, of a map that is a variable of a file.
func keysOfVar(t *testing.T, path, name string) (keys []string) {
	t.Helper()
	ast.Inspect(parse(t, path), func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || spec.Names[0].Name != name {
			return true
		}
		for _, element := range spec.Values[0].(*ast.CompositeLit).Elts {
			keys = append(keys, element.(*ast.KeyValueExpr).Key.(*ast.Ident).Name)
		}
		return false
	})
	return keys
}

// calls returns the methods of fault's constants that the program calls, like TokenCheck.Removed. Tests do not count.
func calls(t *testing.T, root string) map[string]bool {
	t.Helper()
	called := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && path != root && (strings.HasPrefix(entry.Name(), ".") || entry.Name() == "testdata"):
			return filepath.SkipDir
		case entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		ast.Inspect(parse(t, path), func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if method, ok := strings.CutPrefix(types.ExprString(call.Fun), "fault."); ok {
				called[method] = true
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return called
}
