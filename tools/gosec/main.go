// Command gosec is gosec's analyzer alone: the command that gosec ships brings the kits of three clouds with it, for an option
// that has a language model propose changes.
package main

import (
	"github.com/securego/gosec/v2/goanalysis"
	"golang.org/x/tools/go/analysis/singlechecker"
)

func main() { singlechecker.Main(goanalysis.Analyzer) }
