// Package command is what the project's commands have in common: how bench, loadtest and storm end, what they say when they fail, and
// how all read a command line.
package command

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// ErrUsage: the command line was wrong.
var ErrUsage = errors.New("wrong usage")

// Program is a command that is a program of its own.
type Program struct {
	Name string
	Help func() string
	// Do does what args say, until it is done or ctx is. flag.ErrHelp asks for help.
	Do func(ctx context.Context, args []string, stdout, stderr io.Writer) error
	// Patient: a second signal does not end the program at once, because what it started would stay. Its end is bounded anyhow.
	Patient bool
}

// Main is the main function. INT and TERM end ctx. The exit code is 0 when all went well, 2 when the command line is wrong, else 1.
func (p Program) Main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	if !p.Patient {
		context.AfterFunc(ctx, stop)
	}
	switch err := p.Run(ctx, os.Args[1:], os.Stdout, os.Stderr); {
	case errors.Is(err, ErrUsage):
		os.Exit(2)
	case err != nil:
		os.Exit(1)
	}
}

// Run runs the program, shows its help, or tells stderr in one line why it failed.
func (p Program) Run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	err := p.Do(ctx, args, stdout, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, p.Help())
		return nil
	case err != nil:
		joined := strings.ReplaceAll(err.Error(), "\n", "; ") // errors that are joined have a line each
		fmt.Fprintf(stderr, "%s: %s\n", p.Name, OneLine(joined))
	}
	return err
}

// Flags returns an empty set that says nothing by itself.
func Flags() *flag.FlagSet {
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	return flags
}

// Parse reads a command line that has nothing but flags, and checks what they say. Its errors are ErrUsage, or flag.ErrHelp when
// help is asked for.
func Parse(flags *flag.FlagSet, args []string, check func() error) error {
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return err
	case err != nil:
	case flags.NArg() > 0:
		err = fmt.Errorf("%q is not an option", flags.Arg(0))
	default:
		err = check()
	}
	if err != nil {
		return fmt.Errorf("%w: %w; see --help", ErrUsage, err)
	}
	return nil
}

// Given names the flags that stand on the command line.
func Given(flags *flag.FlagSet) (names []string) {
	flags.Visit(func(f *flag.Flag) { names = append(names, f.Name) })
	return names
}

// OneLine trims a text and puts its lines side by side.
func OneLine(text string) string {
	return strings.NewReplacer("\r\n", " ", "\n", " ", "\r", " ").Replace(strings.TrimSpace(text))
}

// IsTerminal tells whether somebody may sit at the other end. It takes other devices for terminals, too.
func IsTerminal(end any) bool {
	f, ok := end.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
